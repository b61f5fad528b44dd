"""The filters against transformers' logits processors, and the text of a growing continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from nanollama_jax.errors import BadInput
from nanollama_jax.infer.sampling import Sampling, choose, filter_logits
from nanollama_jax.infer.text_stream import TextStream
from nanollama_jax.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.7),
        dict(temperature=1.3, top_k=5),
        dict(temperature=1.0, top_k=1000),
        dict(temperature=1.0, top_p=0.6),
        dict(temperature=1.0, top_p=1e-6),
        dict(temperature=0.8, min_p=0.1),
        dict(repetition_penalty=1.5),
        dict(temperature=0.9, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_filters_equal_transformers(settings):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (4, 100)).astype(np.float32)
    history_BT = rng.integers(0, 100, (4, 10))
    sampling = Sampling(**settings)
    seen_BV = np.zeros((4, 100), bool)
    np.put_along_axis(seen_BV, history_BT, True, axis=1)
    ours = filter_logits(logits_BV, seen_BV, sampling.values, sampling.switches)
    theirs = torch.from_numpy(logits_BV)
    for name, make in (
        ("repetition_penalty", hf.RepetitionPenaltyLogitsProcessor),
        ("temperature", hf.TemperatureLogitsWarper),
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ):
        if name in settings:
            theirs = make(settings[name])(torch.from_numpy(history_BT), theirs)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_draws_follow_the_probabilities():
    logits_V = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    n = 4000
    sampling = Sampling(temperature=1.0, top_k=3)
    drawn = choose(
        jnp.tile(logits_V, (n, 1)),
        None,
        jnp.zeros(n, jnp.int32),
        jnp.arange(n),
        sampling.values,
        sampling.switches,
    )
    share = np.bincount(np.asarray(drawn), minlength=4) / n
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_other_values_recompile_nothing():
    traced = []

    @jax.jit
    def filtered(logits_BV, values):
        traced.append(1)
        return filter_logits(logits_BV, None, values, switches)

    for temperature in (0.5, 0.9):
        sampling = Sampling(temperature=temperature, top_p=temperature)
        switches = sampling.switches
        filtered(jnp.zeros((1, 8)), sampling.values)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1),
        dict(top_k=-1),
        dict(top_p=0),
        dict(min_p=1),
        dict(repetition_penalty=0),
        dict(top_k=5),
        dict(seed=-1),
    ],
)
def test_bad_settings(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        Sampling(**bad)


@pytest.fixture(scope="module")
def ours(trained) -> Tokenizer:
    return Tokenizer(trained.parent / "tokenizer.model")


@pytest.fixture(scope="module")
def with_dummy_prefix(shared_data) -> Tokenizer:
    return Tokenizer(shared_data / "tokenizer/mistral_v1_32000.model")


def pieces_of(
    tokenizer: Tokenizer, prompt: list[int], tokens: list[int], sizes: list[int], stop=()
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for size in sizes:
        pieces.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    return [*pieces, stream.push(tokens), stream.finish("length")], stream


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(max_size=60),
    cut=st.integers(0, 20),
    sizes=st.lists(st.integers(1, 5), max_size=40),
)
def test_streamed_text_is_the_text(ours, with_dummy_prefix, text, cut, sizes):
    """Any text, cut between any tokens (within a character too), in pieces of any size.

    For our tokenizer and for a model with a dummy prefix.
    """
    for tokenizer in (ours, with_dummy_prefix):
        ids = tokenizer.encode(text, bos=True)
        prompt, new = ids[: cut + 1], ids[cut + 1 :]
        pieces, stream = pieces_of(tokenizer, prompt, new, sizes)
        before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
        if not whole.startswith(
            before
        ):  # the cut goes through a character: it is the continuation's
            before = before.rstrip("\ufffd")
        assert before + "".join(pieces) == whole
        assert stream.text == "".join(pieces) and stream.tokens == new


@settings(deadline=None, max_examples=100)
@given(
    ids=st.lists(st.integers(0, 1023), min_size=1, max_size=60),
    sizes=st.lists(st.integers(1, 5), max_size=40),
)
def test_streamed_text_of_any_tokens(ours, with_dummy_prefix, ids, sizes):
    for tokenizer in (ours, with_dummy_prefix):
        pieces, _ = pieces_of(tokenizer, [1], ids, sizes)
        assert "".join(pieces) == tokenizer.decode([1, *ids])


def test_what_is_no_character_is_not_held_back_for_ever(ours):
    lead, follow = 0xE2 + 3, 0x82 + 3  # byte pieces come after the three special ones
    stream = TextStream(ours, [1])
    assert stream.push([lead, follow]) == "" and stream.push([lead]) == "\ufffd\ufffd"
    assert stream.push([follow, 0xAC + 3]) == "\u20ac", "and then a whole one"


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 3), max_size=40),
    stop=st.lists(st.sampled_from(["lf", "self", ", sel", "q", "aa", "aab"]), max_size=3),
)
def test_a_stop_string_is_never_shown(ours, sizes, stop):
    text = "def f(a, self, quiet): aaab"
    ids = ours.encode(text)
    pieces, stream = pieces_of(ours, [1], ids, sizes, stop)
    ends = [text.index(string) for string in stop if string in text]
    expected = text[: min(ends)] if ends else text
    assert "".join(pieces) == stream.text == expected
    assert stream.finish_reason == ("stop" if ends else "length")


def test_overlapping_stop_strings_are_held_back(ours):
    """The longest possible start of any of them, whatever their order."""
    ids = ours.encode("self, x")
    for stop in (["lf, x", "self, x"], ["self, x", "lf, x"]):
        pieces, stream = pieces_of(ours, [1], ids, [1] * len(ids), stop)
        assert "".join(pieces) == stream.text == "", pieces
