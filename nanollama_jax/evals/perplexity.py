"""Perplexity of running text, by one of two rules.

`sliding` is that of transformers' page "Perplexity of fixed-length models": each document is encoded with BOS in front, as in training, and
windows of `context` tokens advance over it by `stride`. Each token is scored once, in the first window that holds it: all of the first window,
then the last `stride` tokens of each later one. BOS itself is not scored, and a window in the middle of a document begins without one.
(That page's code weighs each later window as if it had scored one token fewer than it did; here every scored token weighs the same.)

`llama.cpp` is that of llama-perplexity (tools/perplexity/perplexity.cpp): documents are joined by an empty line to one text, which loses a newline
at its end, as a file does there; its tokens, BOS in front, are cut into chunks of `context`, the remainder dropped. The first token of each chunk
is replaced by BOS, and what follows position context // 2 is scored: context - context // 2 - 1 tokens a chunk. There must be two chunks.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from nanollama_jax.console import track
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

Score = Callable[
    [list[list[int]]], list[np.ndarray]
]  # `Engine.score`: for n ids the n - 1 log-probabilities of those from the second on

RULES = ("sliding", "llama.cpp")
LLAMA_CPP_CONTEXT = 512  # llama-perplexity's default
WINDOWS_A_CALL = 64
LONGEST_PIECE = 64  # characters, generously: a text is cut to max_tokens pieces of this length before it is encoded


@dataclasses.dataclass(frozen=True)
class Perplexity:
    tokens: int  # scored
    bytes: (
        int  # of the text that they stand for, UTF-8; a character belongs to the token that ends it
    )
    documents: int
    windows: int
    nats_per_token: float
    standard_error: (
        float | None
    )  # of nats_per_token, from the spread over documents or windows; None if there is one
    over: str  # "documents", or "windows" where there is one document or the rule joins them
    perplexity: float
    bits_per_byte: float
    cut: bool  # the text had more than max_tokens


class Document(NamedTuple):
    text: str
    ids: np.ndarray  # int32, BOS in front
    bytes: int


class Window(NamedTuple):
    ids: np.ndarray
    first: int  # ids[first:] are scored
    document: int


def settle(
    rule: str, context: int | None, stride: int | None, context_length: int
) -> tuple[int, int | None]:
    """Context and stride, defaults filled in, for a model of `context_length`. Raises BadInput for what does not fit."""
    if context is None:
        context = context_length if rule == "sliding" else min(LLAMA_CPP_CONTEXT, context_length)
    if not 2 <= context <= context_length:
        raise BadInput(
            f"context {context:,} must be from 2 to {context_length:,} tokens, the checkpoint's context length"
        )
    if rule == "llama.cpp":
        if stride is not None:
            raise BadInput(
                "the llama.cpp rule has no stride: leave it out, or choose the sliding rule"
            )
        if context < 3:
            raise BadInput("context 2 leaves the llama.cpp rule nothing to score: choose 3 or more")
        return context, None
    stride = context // 2 if stride is None else stride
    if not 1 <= stride < context:
        raise BadInput(
            f"stride {stride:,} must be from 1 to {context - 1:,}, below the context: the first token of a window has nothing before it"
        )
    return context, stride


def describe(rule: str, context: int, stride: int | None) -> str:
    """The rule in one line, for beside the numbers."""
    if rule == "sliding":
        return (
            f"sliding windows of {context:,} tokens, stride {stride:,}; BOS before each document, not scored; every other token is scored once, "
            "in the first window that holds it; later windows of a document begin without BOS"
        )
    return (
        f"llama.cpp's rule: the documents as one text, in chunks of {context:,} tokens; the first of each is replaced by BOS and the last "
        f"{context - context // 2 - 1:,} are scored; the remainder is dropped"
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
    """Perplexity of the first `max_tokens` tokens of `texts`, one a document, by a rule with `settle`d context and stride.

    What sits in memory is the text that these tokens stand for and a few bytes a token. Raises BadInput for no text, or too little for the rule.
    """
    if max_tokens < 1:
        raise BadInput(f"max_tokens {max_tokens} must be at least 1")
    documents, cut = _read(tokenizer, texts, max_tokens)
    if not documents:
        raise BadInput("there is no text in it: check where it comes from")
    if rule == "sliding":
        windows = list(_sliding(documents, context, stride))
        num_bytes = sum(document.bytes for document in documents)
    else:
        ids = tokenizer.encode(
            "\n\n".join(document.text for document in documents).removesuffix("\n"), bos=True
        )
        cut = cut or len(ids) > max_tokens
        windows = _llama_cpp(np.array(ids[:max_tokens], np.int32), context, tokenizer.bos_id)
        num_bytes = sum(_bytes(tokenizer, window.ids, window.first) for window in windows)

    windows.sort(
        key=lambda window: len(window.ids)
    )  # windows of one length go through the model together
    nats, tokens = (
        np.zeros(len(windows)),
        np.array([len(window.ids) - window.first for window in windows]),
    )
    if num_bytes == 0:
        raise BadInput("the tokens do not reach the end of one character: raise max_tokens")
    for start in track(
        range(0, len(windows), WINDOWS_A_CALL), f"{len(windows):,} windows", transient=True
    ):
        batch = windows[start : start + WINDOWS_A_CALL]
        logprobs = score([window.ids.tolist() for window in batch])
        nats[start : start + len(batch)] = [
            -each[window.first - 1 :].sum(dtype=np.float64)
            for window, each in zip(batch, logprobs, strict=True)
        ]
    if not np.isfinite(nats).all():
        raise BadInput(
            "the model gives log-probabilities that are not finite: choose an earlier checkpoint"
        )

    over = "documents" if rule == "sliding" and len(documents) > 1 else "windows"
    if over == "documents":
        of_window = [window.document for window in windows]
        nats, tokens = np.bincount(of_window, nats), np.bincount(of_window, tokens)
    total, mean = int(tokens.sum()), nats.sum() / tokens.sum()
    # Of a ratio of two sums over independent clusters (Cochran 1977, section 6.3); tokens within a document are not independent.
    error = (
        float(np.sqrt(len(nats) / (len(nats) - 1) * np.sum((nats - mean * tokens) ** 2)) / total)
        if len(nats) > 1
        else None
    )
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
    """Documents of up to `max_tokens` tokens together, BOS not counted, and whether there was more."""
    documents, left = [], max_tokens
    for text in texts:
        if left == 0:
            return documents, True
        head = text[: LONGEST_PIECE * left]
        ids = np.array(tokenizer.encode(head, bos=True), np.int32)
        whole = len(head) == len(text) and len(ids) - 1 <= left
        ids = ids[: 1 + left]
        if len(ids) > 1:
            documents.append(
                Document(head, ids, len(text.encode()) if whole else _bytes(tokenizer, ids, 1))
            )
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
        needed = f"two chunks of {context:,} tokens, and there are {len(ids):,} in all"
        raise BadInput(
            f"the llama.cpp rule needs {needed}: give more text, or more max_tokens, or a smaller context"
        )
    chunks = ids[: len(ids) // context * context].reshape(-1, context)
    chunks[:, 0] = bos_id
    return [Window(chunk, context // 2 + 1, 0) for chunk in chunks]


def _bytes(tokenizer: Tokenizer, ids: np.ndarray, first: int) -> int:
    """Of what ids[first:] stand for, ids[:first] before it. A character split between tokens belongs to the last of them."""
    whole, before = (tokenizer.decode(part).rstrip("\ufffd") for part in (ids, ids[:first]))
    return len(whole.encode()) - len(before.encode())
