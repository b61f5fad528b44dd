"""Chunked cross-entropy + z-loss against float64, and that the full logits are never made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama_jax import sharding
from nanollama_jax.train.losses import cross_entropy

Z = 1e-3


def float64_oracle(hidden_BTD, head_DV, targets_BT, weights_BT):
    """(total, ce, z, weight), d_hidden, d_head in float64, full logits."""
    x, head = (
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).astype(np.float64),
        head_DV.astype(np.float64),
    )
    y, w = (
        np.where(weights_BT > 0, targets_BT, 0).reshape(-1),
        weights_BT.reshape(-1).astype(np.float64),
    )
    logits = x @ head
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
    ce, z = (w * (lse - logits[np.arange(len(y)), y])).sum(), (w * lse**2).sum()
    d_logits = np.exp(logits - lse[:, None]) * (1 + 2 * Z * lse)[:, None]
    d_logits[np.arange(len(y)), y] -= 1
    d_logits *= w[:, None]
    return (
        (ce + Z * z, ce, z, w.sum()),
        (d_logits @ head.T).reshape(hidden_BTD.shape),
        x.T @ d_logits,
    )


def example(B=4, T=37, D=32, V=301, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32) * 0.5,
    )
    targets, weights = (
        rng.integers(0, V, (B, T), dtype=np.int32),
        rng.choice([0.0, 1.0, 0.25], (B, T)).astype(np.float32),
    )
    return hidden, head, np.where(weights > 0, targets, -100).astype(np.int32), weights


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("chunk_tokens", [16, 100, 4096])
def test_agrees_with_float64(chunk_tokens, devices):
    hidden, head, targets, weights = example()
    with sharding.use_mesh(sharding.make_mesh(1, -1, devices=jax.devices()[:devices])):
        run = jax.jit(
            jax.value_and_grad(
                lambda h, w: (lambda s: (s[0], s))(
                    cross_entropy(h, w, targets, weights, Z, chunk_tokens)
                ),
                (0, 1),
                has_aux=True,
            )
        )
        (_, sums), (d_hidden, d_head) = run(hidden, head)
        plain = jax.jit(lambda h, w: cross_entropy(h, w, targets, weights, Z, chunk_tokens))(
            hidden, head
        )
    want, want_d_hidden, want_d_head = float64_oracle(hidden, head, targets, weights)
    np.testing.assert_allclose(sums, want, rtol=1e-6)
    np.testing.assert_allclose(plain, want, rtol=1e-6)
    assert np.abs(d_hidden - want_d_hidden).max() <= 1e-6 * np.abs(want_d_hidden).max()
    assert np.abs(d_head - want_d_head).max() <= 1e-6 * np.abs(want_d_head).max()


@pytest.mark.usefixtures("one_device")
def test_ignored_targets_have_no_gradient_and_do_not_count():
    hidden, head, targets, weights = example()
    weights[1] = 0
    run = jax.value_and_grad(lambda h, t: cross_entropy(h, head, t, weights, Z, 64)[0])
    value, grads = run(hidden, targets)
    other, _ = run(hidden, np.where(weights > 0, targets, 7))
    assert value == other
    assert (np.asarray(grads)[weights == 0] == 0).all() and np.abs(grads[0]).max() > 0


@pytest.mark.usefixtures("one_device")
def test_gradient_scales_with_its_cotangent():
    hidden, head, targets, weights = example()
    one, three = (
        jax.grad(lambda h, c=c: c * cross_entropy(h, head, targets, weights, Z, 64)[0])(hidden)
        for c in (1.0, 3.0)
    )
    np.testing.assert_allclose(3 * one, three, rtol=1e-6)


@pytest.mark.usefixtures("one_device")
def test_bf16_head_gradient_is_accumulated_in_fp32():
    hidden, head, targets, weights = example(T=512)
    _, _, want = float64_oracle(
        hidden.astype(jnp.bfloat16).astype(np.float32),
        head.astype(jnp.bfloat16).astype(np.float32),
        targets,
        weights,
    )
    got = jax.grad(
        lambda w: cross_entropy(hidden.astype(jnp.bfloat16), w, targets, weights, Z, 32)[0]
    )(head)
    assert got.dtype == jnp.float32
    assert (
        np.abs(got - want).max() < 5e-3 * np.abs(want).max()
    )  # 64 chunks; summed in bf16 it is 2e-2


@pytest.mark.parametrize("devices", [1, 2])
def test_1b_shape_never_allocates_the_full_logits(devices):
    B, T, D, V, chunk = 4, 4096, 2048, 32000, 1024
    with sharding.use_mesh(sharding.make_mesh(1, -1, devices=jax.devices()[:devices])) as mesh:
        del mesh
        shapes = [
            jax.ShapeDtypeStruct(s, d)
            for s, d in (
                ((B, T, D), jnp.bfloat16),
                ((D, V), jnp.float32),
                ((B, T), jnp.int32),
                ((B, T), jnp.float32),
            )
        ]
        loss = jax.jit(
            jax.grad(lambda h, w, t, m: cross_entropy(h, w, t, m, 1e-4, chunk)[0], (0, 1))
        )
        used = loss.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < B * T * V * 4 / devices, (
        f"{used / 1e9:.2f} GB of temporaries: full fp32 logits are {B * T * V * 4 / devices / 1e9:.2f} GB a device"
    )
