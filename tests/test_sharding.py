"""The mesh: the real program computes the same on every shape of it; the helpers place arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from configs import phase1
from nanollama_jax import sharding
from nanollama_jax.model import ModelConfig
from nanollama_jax.train import step
from nanollama_jax.train.losses import cross_entropy
from tests.train.test_losses import Z, example, float64_oracle

MODEL = ModelConfig(
    vocab_size=128, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64
)
MESHES = [(2, 2), (1, 4), (4, 1), (2, 1)]


def mesh_of(data, fsdp):
    return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def batch_of(B, T):
    """Rows of two documents and padding, in which unequal numbers of tokens are learned."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (B, T + 1), dtype=np.int32)
    segment_ids = np.repeat([[1, 2, 3]], T // 4 * np.array([1, 2, 1]), axis=1).repeat(B, axis=0)
    learned = rng.random((B, T)) < rng.choice([0.0, 0.25, 1.0], (B, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (learned & (segment_ids < 3)).astype(np.float32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32) % (T // 4), (B, 1)),
    }


def one_step(data, fsdp, accumulation=1):
    """(metrics, gradients, initial and new parameters). AdamW's first moment is 0.1 x gradient."""
    config = phase1.get_config("nano")
    config.update(batch_size=8, seq_len=32, tokens_per_step=256, accumulation=accumulation)
    config.optimizer.clip_norm = 1e9
    config.loss.chunk_tokens = 24  # does not divide a device's tokens
    mesh = mesh_of(data, fsdp)
    with sharding.use_mesh(mesh):
        program = step.program(config, MODEL, mesh)
        state = program.make_state()
        before = jax.device_get(state.params)
        state, metrics = program.update(state, sharding.put_batch(batch_of(8, 32), mesh))
    gradients = jax.tree.map(lambda mu: mu / 0.1, state.opt_state[1].mu)
    return jax.device_get((metrics, gradients, before, state.params))


@pytest.fixture(scope="module")
def alone():
    return one_step(1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"), [*((*mesh, 1) for mesh in MESHES), (2, 2, 2)]
)
def test_every_mesh_gives_the_same_loss_gradients_and_update(alone, data, fsdp, accumulation):
    metrics, gradients, initial, params = one_step(data, fsdp, accumulation)
    for name, value in alone[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert max(np.abs(x).max() for x in jax.tree.leaves(alone[1])) > 1e-3
    for (path, ours), one in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(alone[1]), strict=True
    ):
        worst = np.abs(ours - one).max() / np.abs(one).max()
        assert worst < 1e-5, f"{jax.tree_util.keystr(path)}: off by {worst:.1e}"
    jax.tree.map(np.testing.assert_array_equal, initial, alone[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, alone[3])


@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), (4, 1), (1, 4)])
def test_the_heads_gradient_is_summed_over_data_and_split_over_fsdp(data, fsdp):
    """Against float64: summed over both axes, and left split along the model width."""
    hidden, head, targets, weights = example(B=4)
    want, _, want_d_head = float64_oracle(hidden, head, targets, weights)
    mesh = mesh_of(data, fsdp)
    with sharding.use_mesh(mesh):
        total, d_head = jax.jit(
            jax.value_and_grad(lambda head: cross_entropy(hidden, head, targets, weights, Z, 16)[0])
        )(head)
    np.testing.assert_allclose(total, want[0], rtol=1e-6)
    assert np.abs(d_head - want_d_head).max() <= 1e-6 * np.abs(want_d_head).max()
    assert d_head.sharding.shard_shape(d_head.shape)[0] == d_head.shape[0] // fsdp


def test_moments_lie_as_their_parameters_do_and_the_rest_is_replicated():
    mesh = mesh_of(2, 2)
    params = {"head": {"kernel": jnp.zeros((8, 4))}, "norm": {"scale": jnp.zeros(8)}}
    shardings = {
        "head": {"kernel": jax.NamedSharding(mesh, P("fsdp"))},
        "norm": {"scale": sharding.replicated(mesh)},
    }
    # A leaf with a parameter's path and another shape (a factored moment) is not that parameter's.
    state = {"mu": params, "count": jnp.int32(0), "row": {"head": {"kernel": jnp.zeros(8)}}}
    found = sharding.shardings_like(state, params, shardings, mesh)
    assert found["mu"] == shardings
    assert found["count"] == found["row"]["head"]["kernel"] == sharding.replicated(mesh)


def test_parameters_are_split_over_fsdp_along_the_model_width():
    """And along nothing else, so that `data` replicates them."""
    mesh = mesh_of(2, 2)
    with sharding.use_mesh(mesh):
        _, shapes, shardings = step.init_state(MODEL, optax.identity(), mesh, seed=0)
    D, split = MODEL.d_model, 0
    for (path, leaf), where in zip(
        jax.tree.leaves_with_path(shapes.params), jax.tree.leaves(shardings.params), strict=True
    ):
        axes = [axis for axis in where.spec if axis is not None]
        if "scale" in jax.tree_util.keystr(path):  # a norm's
            assert axes == []
            continue
        assert axes == ["fsdp"] and leaf.shape[where.spec.index("fsdp")] == D, path
        split += leaf.size
    assert split > 0.98 * sum(leaf.size for leaf in jax.tree.leaves(shapes.params))


@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), (4, 1), (1, 4)])
def test_each_device_gets_its_own_rows_in_order(data, fsdp):
    mesh, rows = mesh_of(data, fsdp), np.arange(8 * 3).reshape(8, 3)
    placed = sharding.put_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    found = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for i, device in enumerate(mesh.devices.flatten()):
        np.testing.assert_array_equal(found[device], rows[2 * i : 2 * i + 2])


def test_micro_batches_hold_every_row_once_and_move_none():
    mesh, rows = mesh_of(2, 2), np.arange(16)[:, None] * np.ones((1, 3), np.int32)
    with sharding.use_mesh(mesh):
        batch = sharding.put_batch({"tokens": rows}, mesh)
        split = jax.jit(sharding.split_microbatches, static_argnums=1)(batch, 2)["tokens"]
    assert split.shape == (2, 8, 3)
    np.testing.assert_array_equal(split, [rows[::2], rows[1::2]])
    before = {x.device: set(np.asarray(x.data)[:, 0]) for x in batch["tokens"].addressable_shards}
    after = {x.device: set(np.asarray(x.data)[..., 0].flatten()) for x in split.addressable_shards}
    assert before == after
