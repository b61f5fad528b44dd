"""The model against transformers, and what a document mask must guarantee."""

import dataclasses
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nanollama_jax.model import Llama, ModelConfig, llama
from nanollama_jax.train.objectives import next_token
from tests.model.oracle import hf_model, hf_names, read_stories260k

logits = jax.jit(llama.logits, static_argnums=0)

SMALL = ModelConfig(
    vocab_size=97, num_layers=3, d_model=64, num_heads=8, num_kv_heads=2, head_dim=16, ffn_dim=160
)


@functools.partial(jax.jit, static_argnums=0)
def random_params(model: ModelConfig, seed: int = 0):
    """Initialised, then made large enough that every part matters to the logits, norms included."""
    dummy = jnp.zeros((1, 8), jnp.int32)
    params = nn.meta.unbox(
        Llama(model).init(jax.random.key(seed), dummy, dummy, dummy, jnp.float32(1e4))["params"]
    )
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree,
        [x * 2 + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)],
    )


def whole_rows(tokens_BT):
    B, T = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return tokens_BT, positions_BT, np.ones((B, T), np.int32)


def random_tokens(model, B, T, seed=0):
    return np.random.default_rng(seed).integers(0, model.vocab_size, (B, T), dtype=np.int32)


@pytest.mark.parametrize("rope_theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_logits_agree_with_transformers(kv_heads, rope_theta):
    model = dataclasses.replace(SMALL, num_kv_heads=kv_heads)
    params, tokens = random_params(model), random_tokens(model, 2, 300)
    ours = logits(model, params, *whole_rows(tokens), rope_theta)
    with torch.no_grad():
        theirs = hf_model(model, params, rope_theta)(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def check_loss_and_gradients(model, params, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    names = ("tokens", "positions", "segment_ids")
    batch = dict(
        zip(names, whole_rows(inputs), strict=True),
        targets=targets,
        loss_weights=np.ones(targets.shape, np.float32),
    )
    objective = functools.partial(next_token, model=model, z_loss=0.0, chunk_tokens=64)
    (total, sums), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params, batch, jnp.float32(1e4)
    )
    hf = hf_model(model, params, 1e4)
    loss = hf(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()).loss
    loss.backward()
    np.testing.assert_allclose(total / sums["weight"], loss.item(), rtol=1e-4)
    theirs = {name: parameter.grad.numpy() for name, parameter in hf.named_parameters()}
    for name, ours in hf_names(model, grads).items():
        error = np.abs(ours / sums["weight"] - theirs[name]).max() / np.abs(theirs[name]).max()
        assert error < 1e-4, (name, error)


@pytest.mark.usefixtures("one_device")
def test_loss_and_every_gradient_agree_with_transformers():
    check_loss_and_gradients(SMALL, random_params(SMALL), random_tokens(SMALL, 2, 130))


@pytest.mark.usefixtures("one_device")
def test_stories260k_agrees_with_transformers_and_tells_its_story(shared_data):
    model, params = read_stories260k(shared_data / "weights/stories260K/stories260K.bin")
    params = jax.tree.map(jnp.asarray, params)
    hf = hf_model(model, params, 1e4)
    with torch.no_grad():
        story = (
            hf.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0]
            .numpy()
            .astype(np.int32)
        )
    ours = logits(model, params, *whole_rows(story[None]), 1e4)
    with torch.no_grad():
        np.testing.assert_allclose(
            ours, hf(torch.from_numpy(story[None]).long()).logits.numpy(), atol=1e-4
        )
    np.testing.assert_array_equal(
        np.argmax(ours[0, :-1], -1), story[1:]
    )  # greedy decoding by ours gives the same 200 tokens
    piece = llama2c_pieces(shared_data / "weights/stories260K/tok512.bin")
    text = "".join(piece[t] for t in story[1:])
    assert text.strip().startswith("Once upon a time, there was a little girl named"), text
    # its tied head gets one gradient in transformers and two here
    untied = dataclasses.replace(model)
    check_loss_and_gradients(untied, params, story[None, :120])


def llama2c_pieces(path):
    blob, offset, pieces = path.read_bytes(), 4, []
    while offset < len(blob):
        size = int.from_bytes(blob[offset + 4 : offset + 8], "little")
        pieces.append(blob[offset + 8 : offset + 8 + size].decode("utf-8", "replace"))
        offset += 8 + size
    return pieces


def packed_row(documents, length):
    """Documents (lists of tokens) end to end in a row of `length`, padded as the pipeline pads."""
    tokens, positions, segments = np.zeros((3, 1, length), np.int32)
    start = 0
    for i, document in enumerate([*documents, [0] * (length - sum(map(len, documents)))], start=1):
        end = start + len(document)
        tokens[0, start:end], positions[0, start:end], segments[0, start:end] = (
            document,
            np.arange(len(document)),
            i,
        )
        start = end
    return tokens, positions, segments


@pytest.mark.parametrize("remat", ["none", "full"])
def test_neighbours_in_a_row_do_not_move_a_bit(remat):
    model = dataclasses.replace(SMALL, remat=remat)
    params, rng = random_params(model), np.random.default_rng(1)
    document = rng.integers(0, 97, 150).tolist()
    results = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        before, after = (
            rng.integers(0, 97, 100).tolist(),
            rng.integers(0, 97, 30 + 20 * seed).tolist(),
        )
        results.append(
            np.asarray(logits(model, params, *packed_row([before, document, after], 320), 1e4))[
                0, 100:250
            ]
        )
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    alone = np.asarray(logits(model, params, *whole_rows(np.array([document], np.int32)), 1e4))[0]
    np.testing.assert_allclose(results[0], alone, atol=1e-4)


def test_without_the_document_mask_neighbours_do_matter():
    model = dataclasses.replace(SMALL, document_mask=False)
    params = random_params(model)
    a, b = (
        logits(model, params, *packed_row([[i] * 10, [5] * 10], 20), 1e4)[0, 10:] for i in (1, 2)
    )
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


@pytest.mark.usefixtures("one_device")
def test_loss_of_a_packed_row_is_the_sum_over_its_documents():
    params, rng = random_params(SMALL), np.random.default_rng(2)
    documents = [rng.integers(0, 97, n).tolist() for n in (40, 7, 93, 1)]
    objective = jax.jit(functools.partial(next_token, model=SMALL, z_loss=1e-4, chunk_tokens=64))

    def total(row, documents):
        tokens, positions, segments = row
        targets, weights, start = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32), 0
        for document in documents:
            end = start + len(document)
            targets[0, start : end - 1], weights[0, start : end - 1] = document[1:], 1
            start = end
        batch = {
            "tokens": tokens,
            "positions": positions,
            "segment_ids": segments,
            "targets": targets,
            "loss_weights": weights,
        }
        return float(objective(params, batch, jnp.float32(1e4))[0])

    packed = total(packed_row(documents, 160), documents)
    alone = sum(total(whole_rows(np.array([d], np.int32)), [d]) for d in documents)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


def test_causality_by_gradients():
    params, tokens = random_params(SMALL), random_tokens(SMALL, 1, 140)
    _, positions, segments = whole_rows(tokens)

    def logit_of_position_70(embedding):
        return logits(
            SMALL,
            params | {"embedding": {"kernel": embedding}},
            np.arange(140, dtype=np.int32)[None] % 97,
            positions,
            segments,
            1e4,
        )[0, 70].sum()

    # tokens are 0..96, 0..42: embedding rows 71..96 are only ever seen after position 70
    grads = np.abs(
        np.asarray(jax.jit(jax.grad(logit_of_position_70))(params["embedding"]["kernel"]))
    ).max(-1)
    assert (grads[71:] == 0).all() and (grads[:71] > 0).all()


@pytest.mark.parametrize(
    "change", [dict(remat="full"), dict(remat="gate_up"), dict(scan_layers=False)]
)
@pytest.mark.usefixtures("one_device")
def test_remat_and_unrolling_change_nothing(change):
    params, tokens = random_params(SMALL), random_tokens(SMALL, 2, 64)
    model = dataclasses.replace(SMALL, **change)
    batch = dict(
        zip(("tokens", "positions", "segment_ids"), whole_rows(tokens), strict=True),
        targets=tokens,
        loss_weights=np.ones(tokens.shape, np.float32),
    )

    def unrolled(params):
        layers = {
            f"layers_{i}": jax.tree.map(operator.itemgetter(i), params["layers"])
            for i in range(SMALL.num_layers)
        }
        return {k: v for k, v in params.items() if k != "layers"} | layers

    arrange = (lambda p: p) if model.scan_layers else unrolled
    value = jax.jit(
        jax.value_and_grad(
            lambda p, m, a: next_token(a(p), batch, jnp.float32(1e4), m, 1e-4, 64)[0]
        ),
        static_argnums=(1, 2),
    )
    loss, grads = value(params, SMALL, lambda p: p)
    other_loss, other_grads = value(params, model, arrange)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max()),
        grads,
        other_grads,
    )


def test_bf16_embedding_gradient_is_summed_in_float32():
    """2,000 of one token: summed in 16 bits its gradient would be several percent off."""
    model = dataclasses.replace(SMALL, num_layers=1, dtype="bfloat16")
    params, tokens = random_params(model), np.full((20, 100), 5, np.int32)

    def total(params, model):
        hidden_BTD = Llama(model).apply({"params": params}, *whole_rows(tokens), jnp.float32(1e4))
        return jnp.sum(hidden_BTD.astype(jnp.float32) * jnp.linspace(0.5, 1.5, 64))

    grads = [
        jax.jit(jax.grad(total), static_argnums=1)(params, m)["embedding"]["kernel"][5]
        for m in (model, dataclasses.replace(model, dtype="float32"))
    ]
    assert np.abs(grads[0] - grads[1]).max() < 0.02 * np.abs(grads[1]).max()


def test_rope_theta_is_traced():
    params, tokens = random_params(SMALL), random_tokens(SMALL, 1, 16)
    traces = []

    @jax.jit
    def run(params, theta):
        traces.append(1)
        return Llama(SMALL).apply({"params": params}, *whole_rows(tokens), theta)

    a, b = run(params, jnp.float32(1e4)), run(params, jnp.float32(5e5))
    assert len(traces) == 1 and np.abs(np.asarray(a - b)).max() > 1e-4
