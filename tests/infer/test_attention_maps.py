"""Attention maps against the probabilities that transformers gives whole."""

import numpy as np
import pytest
import torch

from nanollama_jax import tokenizer
from nanollama_jax.errors import BadInput
from nanollama_jax.infer.attention_maps import (
    QUERIES_PER_BLOCK,
    attention_maps,
    choose_layers,
    plot,
    read_tokens,
)
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import Tokenizer
from tests.model.oracle import hf_model, random_params

SMALL = ModelConfig(
    vocab_size=97, num_layers=3, d_model=64, num_heads=8, num_kv_heads=2, head_dim=16, ffn_dim=160
)
T, THETA = 300, 5e5


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.mark.parametrize("bins", [7, 40, 500])
def test_maps_and_distances_agree_with_transformers(params, bins):
    ids = np.random.default_rng(1).integers(0, SMALL.vocab_size, (1, T))
    with torch.no_grad():
        attentions = hf_model(SMALL, params, THETA)(
            torch.from_numpy(ids), output_attentions=True
        ).attentions
    p_LNTS = np.stack([each[0].double().numpy() for each in attentions])
    maps = attention_maps(SMALL, params, ids[0], THETA, bins)

    assert T % QUERIES_PER_BLOCK and T % 7 and maps.num_tokens == T
    edges = list(range(0, T, maps.bin_width))
    assert len(edges) <= bins and len(edges) == maps.pooled_LNQS.shape[-1]
    by_key = np.add.reduceat(p_LNTS, edges, axis=3)
    expected = np.stack(
        [by_key[:, :, edge : edge + maps.bin_width].mean(axis=2) for edge in edges], axis=2
    )
    np.testing.assert_allclose(
        maps.pooled_LNQS, expected, atol=1e-5
    )  # each side rounds to 2e-6 of float64
    np.testing.assert_allclose(maps.pooled_LNQS.sum(-1), 1, atol=1e-5)
    assert (p_LNTS[:, :, -1].std(-1) * T > 0.3).all(), (
        "the attention of this model is too flat to tell anything"
    )

    back_TS = np.arange(T)[:, None] - np.arange(T)
    np.testing.assert_allclose(maps.distance_LN, (p_LNTS * back_TS).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(maps.first_share_LN, p_LNTS[..., 0].mean(-1), rtol=1e-5)


def test_the_picture_is_whole_or_not_there(params, tmp_path):
    maps = attention_maps(SMALL, params, np.arange(20), THETA, 8)
    plot(maps, [1], "what a$b$.txt holds", tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"], "a temporary file was left"


def test_layers_to_draw():
    assert choose_layers(4, None) == [0, 1, 2, 3]
    assert choose_layers(22, None) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert choose_layers(22, "0,5,21") == [0, 5, 21]
    for wrong in ("22", "-1", "a", "1,,2", ""):
        with pytest.raises(BadInput, match="from 0 to 21"):
            choose_layers(22, wrong)


def test_reading_a_text(tmp_path):
    tokenizer.train(
        ["the cat sat on the mat " * 50], tmp_path / "t.model", vocab_size=275, max_bytes=10**6
    )
    model, path = Tokenizer(tmp_path / "t.model"), tmp_path / "text.txt"
    path.write_text("the cat sat " * 9)
    ids = model.encode("the cat sat " * 9, bos=True)
    assert read_tokens(path, model, 512) == (ids, len(ids))
    assert read_tokens(path, model, 10) == (ids[:10], len(ids))
    assert read_tokens(path, model, 10, 5) == (ids[:5], len(ids))
    for max_tokens in (1, 11):
        with pytest.raises(BadInput, match="from 2 to the checkpoint's context of 10"):
            read_tokens(path, model, 10, max_tokens)
    for content, says in ((b" \n", "is empty"), (b"a\nb\xff", r"text.txt:2: invalid UTF-8")):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=says):
            read_tokens(path, model, 10)
    with pytest.raises(BadInput, match="No such file"):
        read_tokens(tmp_path / "absent.txt", model, 10)
