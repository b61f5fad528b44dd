"""Perplexity against transformers' loop and against llama-perplexity's rule, written in torch."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax import tokenizer
from nanollama_jax.errors import BadInput
from nanollama_jax.evals.perplexity import WINDOWS_PER_CALL, describe, measure, resolve
from nanollama_jax.infer.engine import Engine
from nanollama_jax.model import ModelConfig
from tests.model.oracle import hf_model, random_params

MODEL = ModelConfig(
    vocab_size=259, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)
BOS, THETA = 1, 1e4


class ByteTokenizer:
    bos_id, vocab_size = BOS, 259

    def encode(self, text, *, bos=False):
        return [BOS] * bos + [byte + 3 for byte in text.encode()]

    def decode(self, ids):
        return bytes(int(token) - 3 for token in ids if token >= 3).decode(errors="replace")


class CharacterTokenizer(ByteTokenizer):
    """Every character is a token of its own, so that a test can number them."""

    def encode(self, text, *, bos=False):
        return [BOS] * bos + [ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(token) for token in ids if token != BOS)


@pytest.fixture(scope="module")
def oracle():
    params = random_params(MODEL)
    engine = Engine(MODEL, params, ByteTokenizer(), rope_theta=THETA, context_length=32)
    return engine.score, hf_model(MODEL, params, THETA)


def random_texts(*lengths: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(map(chr, rng.integers(32, 127, length))) for length in lengths]


@pytest.mark.parametrize(("context", "stride"), [(24, 12), (24, 5), (24, 23)])
def test_sliding_is_the_loop_of_transformers_documentation(oracle, context, stride):
    score, hf = oracle
    texts = random_texts(
        100, stride - 2, context - 1, context, context + stride - 1, 1
    )  # the third is one window with its BOS
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([ByteTokenizer().encode(text, bos=True)])
        scored_to = 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + context, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : -(end - scored_to)] = -100
            count = (
                (labels[:, 1:] != -100).sum().item()
            )  # of what the model's mean is over; the page's code is one off after the first window
            with torch.no_grad():
                nats += count * hf(ids[:, begin:end], labels=labels).loss.item()
            tokens, scored_to = tokens + count, end
            if end == ids.shape[1]:
                break
    ours = measure(
        score,
        ByteTokenizer(),
        texts,
        rule="sliding",
        context=context,
        stride=stride,
        max_tokens=10**6,
    )
    assert ours.tokens == tokens == ours.bytes == sum(map(len, texts))
    assert (ours.documents, ours.cut) == (6, False)
    assert ours.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert ours.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert ours.bits_per_byte == pytest.approx(nats / math.log(2) / tokens, rel=1e-5)


@pytest.mark.parametrize("context", [16, 17])
def test_llama_cpp_written_out_with_torch(oracle, context):
    score, hf = oracle
    texts = [*random_texts(30, 9, 40), "ends with a newline\n"]
    ids = ByteTokenizer().encode("\n\n".join(texts)[:-1], bos=True)
    chunks = len(ids) // context
    assert len(ids) % context, "a remainder must be there to be dropped"
    nats = []
    for chunk in range(chunks):
        there = [BOS, *ids[chunk * context + 1 : (chunk + 1) * context]]
        with torch.no_grad():
            logits = hf(torch.tensor([there])).logits[0].double()
        nats += [
            -torch.log_softmax(logits[position], -1)[there[position + 1]].item()
            for position in range(context // 2, context - 1)
        ]
    ours = measure(
        score,
        ByteTokenizer(),
        texts,
        rule="llama.cpp",
        context=context,
        stride=None,
        max_tokens=10**6,
    )
    assert (ours.windows, ours.tokens, ours.over) == (
        chunks,
        chunks * (context - context // 2 - 1),
        "windows",
    )
    assert ours.tokens == len(nats) == ours.bytes
    assert ours.nats_per_token == pytest.approx(np.mean(nats), rel=1e-5)
    of_chunk = np.reshape(nats, (chunks, -1)).mean(1)
    assert ours.standard_error == pytest.approx(of_chunk.std(ddof=1) / chunks**0.5, rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_token_is_scored_once_with_all_the_context_that_a_window_gives(data):
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    context = data.draw(st.integers(2, 40))
    stride = data.draw(st.integers(1, context - 1))
    numbers = itertools.count(256)
    texts = ["".join(chr(next(numbers)) for _ in range(length)) for length in lengths]
    weight = np.random.default_rng(0).random(
        256 + sum(lengths)
    )  # no two sets of tokens weigh the same

    def run(logprobs):
        def score(sequences):
            assert len(sequences) <= WINDOWS_PER_CALL and all(
                1 < len(ids) <= context for ids in sequences
            )
            return [logprobs(np.array(ids)) for ids in sequences]

        return measure(
            score,
            CharacterTokenizer(),
            texts,
            rule="sliding",
            context=context,
            stride=stride,
            max_tokens=10**6,
        )

    total = run(lambda ids: -weight[ids[1:]])
    assert total.tokens == sum(lengths)
    assert total.nats_per_token * total.tokens == pytest.approx(weight[256:].sum(), rel=1e-12)
    seen = run(lambda ids: -np.arange(1.0, len(ids)))  # how many ids are before a token
    most = [
        t - stride * math.ceil(max(0, t + 1 - context) / stride)
        for length in lengths
        for t in range(1, length + 1)
    ]
    assert seen.nats_per_token * seen.tokens == pytest.approx(sum(most))
    if len(lengths) > 1:
        means = np.array(
            [np.sum(part) for part in np.split(weight[256:], np.cumsum(lengths)[:-1])]
        ) - total.nats_per_token * np.array(lengths)
        count = len(lengths)
        assert total.standard_error == pytest.approx(
            np.sqrt(count / (count - 1) * np.sum(means**2)) / total.tokens
        )


def flat(sequences):
    return [np.full(len(ids) - 1, -1.0, np.float32) for ids in sequences]


def test_max_tokens_cuts_and_says_so():
    def run(max_tokens, texts=("abcdef", "ghij"), rule="sliding", context=4, stride=2):
        return measure(
            flat,
            ByteTokenizer(),
            texts,
            rule=rule,
            context=context,
            stride=stride,
            max_tokens=max_tokens,
        )

    assert [(run(n).tokens, run(n).documents, run(n).cut) for n in (3, 6, 8, 10)] == [
        (3, 1, True),
        (6, 1, True),
        (8, 2, True),
        (10, 2, False),
    ]
    assert (run(6).over, run(10).over) == ("windows", "documents")
    assert run(2).standard_error is None
    assert [run(n, rule="llama.cpp", stride=None).cut for n in (12, 13)] == [
        True,
        False,
    ]  # the empty line between documents is two tokens
    found = run(
        8, rule="llama.cpp", stride=None
    )  # BOS counts here: of "<s>abc" and "<s>ef\n" the last is scored
    assert (found.windows, found.tokens, found.bytes, found.cut) == (2, 2, 2, True)

    def endless():
        yield "abcd"
        yield "efgh"
        raise AssertionError("read on after max_tokens")

    assert run(5, texts=endless()).cut


def test_a_character_in_several_tokens_counts_its_bytes_once(tmp_path):
    tokenizer.train(
        ["the cat sat on the mat " * 50], tmp_path / "t.model", vocab_size=275, max_bytes=10**6
    )
    model = tokenizer.Tokenizer(tmp_path / "t.model")
    text = "the cat €𝄞 on é the mat" * 3
    for max_tokens in range(1, len(model.encode(text)) + 1):
        ids = model.encode(text)[:max_tokens]
        raw = b"".join(
            bytes.fromhex(piece[3:5])
            if piece.startswith("<0x")
            else piece.replace("▁", " ").encode()
            for piece in pieces(model, ids)
        )
        found = measure(
            flat, model, [text], rule="sliding", context=8, stride=4, max_tokens=max_tokens
        )
        assert found.bytes == len(raw.decode(errors="ignore").encode()), max_tokens
    assert found.bytes == len(text.encode()) and not found.cut
    found = measure(flat, model, [text], rule="llama.cpp", context=5, stride=None, max_tokens=10**6)
    assert abs(found.bytes - found.tokens / len(model.encode(text)) * len(text.encode())) < 12


def pieces(model, ids):
    return [model._processor.id_to_piece(token) for token in ids]


def test_defaults_and_the_line_beside_the_numbers():
    assert resolve("sliding", None, None, 4096) == (4096, 2048)
    assert resolve("llama.cpp", None, None, 4096) == (512, None)
    assert resolve("llama.cpp", None, None, 256) == (256, None)
    assert "1,024 tokens, stride 512" in describe("sliding", 1024, 512)
    assert "512 tokens" in describe("llama.cpp", 512, None) and "last 255" in describe(
        "llama.cpp", 512, None
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sliding", 129, None), "128 tokens, the checkpoint's"),
        (("sliding", 1, None), "from 2"),
        (("sliding", 16, 16), "from 1 to 15"),
        (("sliding", 16, 0), "from 1 to 15"),
        (("llama.cpp", 16, 8), "no stride"),
        (("llama.cpp", 2, None), "3 or more"),
    ],
)
def test_bad_settings(arguments, says):
    with pytest.raises(BadInput, match=says):
        resolve(*arguments, 128)


@pytest.mark.parametrize(
    ("texts", "rule", "max_tokens", "says"),
    [
        ([], "sliding", 10, "no text"),
        ([""], "llama.cpp", 10, "no text"),
        (["abc"], "sliding", 0, "max_tokens 0"),
        (["1234567"], "llama.cpp", 10**6, "two chunks of 5 tokens, and there are 8"),
        (
            ["12345678\n"],
            "llama.cpp",
            10**6,
            "there are 9 tokens in all",
        ),  # the last newline does not count
        (["123456789"], "llama.cpp", 9, "there are 9 tokens in all"),
    ],
)
def test_bad_text(texts, rule, max_tokens, says):
    with pytest.raises(BadInput, match=says):
        measure(flat, ByteTokenizer(), texts, rule=rule, context=5, stride=2, max_tokens=max_tokens)


def test_a_broken_model_is_not_reported_as_a_number():
    with pytest.raises(BadInput, match="not finite"):
        measure(
            lambda each: [np.full(len(ids) - 1, np.nan) for ids in each],
            ByteTokenizer(),
            ["abc"],
            rule="sliding",
            context=4,
            stride=2,
            max_tokens=9,
        )
