"""Perplexity of running text, by one of two rules.

`sliding` is the rule of transformers' page "Perplexity of fixed-length models". Each document is
encoded with BOS, as in training, and windows of `context` tokens advance over it by `stride`. Each
token is scored once, in the first window that holds it: all of the first window, then the last
`stride` tokens of each later one. BOS is not scored, and a window inside a document starts without
one. (That page's code weighs each later window as if it had scored one token fewer than it did;
here every scored token has the same weight.)

`llama.cpp` is the rule of llama-perplexity (tools/perplexity/perplexity.cpp). Documents are joined
by an empty line into one text, which loses a final newline, as a file does there. Its tokens, with
BOS, are cut into chunks of `context`, and the remainder is dropped. The first token of each chunk
is replaced by BOS, and what follows position context // 2 is scored: context - context // 2 - 1
tokens per chunk. It needs at least two chunks.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from nanollama_jax.console import track
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

# `Engine.score`: for n ids, the n - 1 log-probabilities of the second to the last
Score = Callable[[list[list[int]]], list[np.ndarray]]

RULES = ("sliding", "llama.cpp")
LLAMA_CPP_CONTEXT = 512  # llama-perplexity's default
WINDOWS_PER_CALL = 64
LONGEST_PIECE = 64  # characters; generous. A text is cut to max_tokens times this before encoding


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`standard_error` is that of nats_per_token, from the spread over documents or windows.

    It is None if there is only one of them.
    """

    tokens: int  # scored
    bytes: int  # UTF-8, of the scored text; a character belongs to the token that ends it
    documents: int
    windows: int
    nats_per_token: float
    standard_error: float | None
    over: str  # "documents", or "windows" if there is one document or the rule joins them
    perplexity: float
    bits_per_byte: float
    cut: bool  # the text had more than max_tokens


class Document(NamedTuple):
    text: str
    ids: np.ndarray  # int32, with BOS
    bytes: int


class Window(NamedTuple):
    ids: np.ndarray
    first: int  # ids[first:] are scored
    document: int


def resolve(
    rule: str, context: int | None, stride: int | None, context_length: int
) -> tuple[int, int | None]:
    """Context and stride with defaults filled in, for a model of `context_length` tokens.

    Raises BadInput for values that do not fit.
    """
    if context is None:
        context = context_length if rule == "sliding" else min(LLAMA_CPP_CONTEXT, context_length)
    if not 2 <= context <= context_length:
        raise BadInput(
            f"context {context:,} must be from 2 to {context_length:,} tokens, the checkpoint's "
            "context length"
        )
    if rule == "llama.cpp":
        if stride is not None:
            raise BadInput("the llama.cpp rule has no stride: remove it, or use the sliding rule")
        if context < 3:
            raise BadInput("context 2 leaves the llama.cpp rule nothing to score: choose 3 or more")
        return context, None
    stride = context // 2 if stride is None else stride
    if not 1 <= stride < context:
        raise BadInput(
            f"stride {stride:,} must be from 1 to {context - 1:,}, below the context: the first "
            "token of a window has no context"
        )
    return context, stride


def describe(rule: str, context: int, stride: int | None) -> str:
    """The rule in one line, to print with the scores."""
    if rule == "sliding":
        return (
            f"sliding windows of {context:,} tokens, stride {stride:,}; each document starts with "
            "BOS, which is not scored; every other token is scored once, in the first window that "
            "holds it; later windows of a document start without BOS"
        )
    return (
        f"llama.cpp's rule: the documents as one text, in chunks of {context:,} tokens; the first "
        f"of each is replaced by BOS and the last {context - context // 2 - 1:,} are scored; the "
        "remainder is dropped"
    )


def measure(
    score: Score,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    rule: str,
    context: int,
    stride: int | None,
    max_tokens: int,
) -> Perplexity:
    """Perplexity of the first `max_tokens` tokens of `texts`, one document each.

    `context` and `stride` are from `resolve`. Memory holds the text of these tokens and a few bytes
    per token. Raises BadInput if there is no text, or too little for the rule.
    """
    if max_tokens < 1:
        raise BadInput(f"max_tokens {max_tokens} must be at least 1")
    documents, cut = _read(tokenizer, texts, max_tokens)
    if not documents:
        raise BadInput("there is no text: check the source")
    if rule == "sliding":
        windows = list(_sliding(documents, context, stride))
        num_bytes = sum(document.bytes for document in documents)
    else:
        text = "\n\n".join(document.text for document in documents).removesuffix("\n")
        ids = tokenizer.encode(text, bos=True)
        cut = cut or len(ids) > max_tokens
        windows = _llama_cpp(np.array(ids[:max_tokens], np.int32), context, tokenizer.bos_id)
        num_bytes = sum(_bytes(tokenizer, window.ids, window.first) for window in windows)

    windows.sort(key=lambda window: len(window.ids))  # equal lengths share a batch
    tokens = np.array([len(window.ids) - window.first for window in windows])
    if num_bytes == 0:
        raise BadInput("the tokens do not complete a single character: raise max_tokens")
    nats = []
    starts = range(0, len(windows), WINDOWS_PER_CALL)
    for start in track(starts, f"{len(windows):,} windows", transient=True):
        batch = windows[start : start + WINDOWS_PER_CALL]
        logprobs = score([window.ids.tolist() for window in batch])
        for window, each in zip(batch, logprobs, strict=True):
            nats.append(-each[window.first - 1 :].sum(dtype=np.float64))
    nats = np.array(nats)
    if not np.isfinite(nats).all():
        raise BadInput("the model's log-probabilities are not finite: choose an earlier checkpoint")

    over = "documents" if rule == "sliding" and len(documents) > 1 else "windows"
    if over == "documents":
        of_window = [window.document for window in windows]
        nats, tokens = np.bincount(of_window, nats), np.bincount(of_window, tokens)
    total, mean = int(tokens.sum()), nats.sum() / tokens.sum()
    # Of a ratio of two sums over independent clusters (Cochran 1977, section 6.3): tokens within a
    # document are not independent
    error, count = None, len(nats)
    if count > 1:
        spread = np.sqrt(count / (count - 1) * np.sum((nats - mean * tokens) ** 2))
        error = float(spread / total)
    return Perplexity(
        tokens=total,
        bytes=num_bytes,
        documents=len(documents),
        windows=len(windows),
        nats_per_token=float(mean),
        standard_error=error,
        over=over,
        perplexity=float(np.exp(mean)),
        bits_per_byte=float(nats.sum() / np.log(2) / num_bytes),
        cut=cut,
    )


def _read(
    tokenizer: Tokenizer, texts: Iterable[str], max_tokens: int
) -> tuple[list[Document], bool]:
    """Documents of up to `max_tokens` tokens in all, without BOS; and whether there was more."""
    documents, left = [], max_tokens
    for text in texts:
        if left == 0:
            return documents, True
        head = text[: LONGEST_PIECE * left]
        ids = np.array(tokenizer.encode(head, bos=True), np.int32)
        whole = len(head) == len(text) and len(ids) - 1 <= left
        ids = ids[: 1 + left]
        if len(ids) > 1:
            num_bytes = len(text.encode()) if whole else _bytes(tokenizer, ids, 1)
            documents.append(Document(head, ids, num_bytes))
            left -= len(ids) - 1
        if not whole:
            return documents, True
    return documents, False


def _sliding(documents: list[Document], context: int, stride: int) -> Iterator[Window]:
    for i, (_, ids, _) in enumerate(documents):
        end = 1  # BOS counts as scored
        for begin in range(0, len(ids), stride):
            scored, end = end, min(begin + context, len(ids))
            yield Window(ids[begin:end], scored - begin, i)
            if end == len(ids):
                break


def _llama_cpp(ids: np.ndarray, context: int, bos_id: int) -> list[Window]:
    if len(ids) < 2 * context:
        raise BadInput(
            f"the llama.cpp rule needs two chunks of {context:,} tokens, and there are "
            f"{len(ids):,} tokens in all: give more text, raise max_tokens, or lower the context"
        )
    chunks = ids[: len(ids) // context * context].reshape(-1, context)
    chunks[:, 0] = bos_id
    return [Window(chunk, context // 2 + 1, 0) for chunk in chunks]


def _bytes(tokenizer: Tokenizer, ids: np.ndarray, first: int) -> int:
    """UTF-8 bytes of ids[first:], after ids[:first]. A character belongs to its last token."""
    whole, before = (tokenizer.decode(part).rstrip("\ufffd") for part in (ids, ids[:first]))
    return len(whole.encode()) - len(before.encode())
