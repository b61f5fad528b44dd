"""The step: the same training on one device and two, in one batch and in micro-batches; parameters truly sharded; non-finite updates skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanollama_jax import sharding
from nanollama_jax.model import ModelConfig
from nanollama_jax.recipes import MODELS
from nanollama_jax.train import objectives, optimizer, step

TINY = ModelConfig(
    vocab_size=128, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64
)
ADAMW = optimizer.make_optimizer(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)


def random_batch(seed, B=8, T=32):
    """Rows with unequal token counts: row i learns a quarter of its tokens, or all, or none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 16, (B, T + 1), dtype=np.int32)
    weights = (rng.random((B, T)) < rng.choice([0.0, 0.25, 1.0], (B, 1))).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    positions = np.stack(
        [np.concatenate([np.arange((row == i).sum()) for i in (1, 2, 3)]) for row in segments]
    ).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "segment_ids": segments,
        "positions": positions,
    }


def compile_step(mesh, accumulation=1):
    make, shapes, shardings = step.init_state(TINY, ADAMW, mesh, seed=0)
    run = functools.partial(
        step.train_step,
        objective=functools.partial(
            objectives.next_token, model=TINY, z_loss=1e-4, chunk_tokens=48
        ),
        optimizer=ADAMW,
        learning_rate=functools.partial(
            optimizer.wsd_schedule, peak=1e-3, warmup_steps=2, decay_start=15, total_steps=20
        ),
        rope_theta=lambda _: jnp.float32(1e4),
        accumulation=accumulation,
        compute_dtype=TINY.dtype,
    )
    return (
        make(),
        jax.jit(run, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))),
        shapes,
        shardings,
    )


def train(data, fsdp, accumulation, steps=20):
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with sharding.use_mesh(mesh):
        state, run, *_ = compile_step(mesh, accumulation)
        losses = []
        for i in range(steps):
            state, metrics = run(state, sharding.put_batch(random_batch(i), mesh))
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def alone():
    return train(1, 1, 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"), [(1, 2, 1), (2, 1, 1), (1, 1, 4), (1, 2, 4)]
)
def test_devices_and_microbatches_change_nothing(alone, data, fsdp, accumulation):
    losses, params = train(data, fsdp, accumulation)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert alone[0][-1] < alone[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, alone[1])


def test_1b_has_1100048384_parameters_and_shards_them_in_half():
    model = ModelConfig(**MODELS["1b"], remat="full")
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    with sharding.use_mesh(mesh):
        _, shapes, shardings = step.init_state(model, ADAMW, mesh, seed=0)
    assert sum(x.size for x in jax.tree.leaves(shapes.params)) == model.num_params == 1_100_048_384
    assert model.matmul_params == 1_034_420_224
    assert (
        round(model.flops_per_token(4096) / 1e9, 2) == 7.31
        and round(model.flops_per_token(16_384) / 1e9, 2) == 10.64
    )
    whole = local = 0
    for (path, leaf), sharded in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        size_here = int(np.prod(sharded.shard_shape(leaf.shape)))
        whole, local = whole + leaf.size, local + size_here
        assert size_here == leaf.size // 2 or leaf.size <= 22 * 2048, (
            f"{jax.tree_util.keystr(path)} {leaf.shape} is replicated"
        )
    assert 0.5 <= local / whole < 0.5001


def test_real_state_is_where_its_shardings_say():
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    with sharding.use_mesh(mesh):
        state, run, _, shardings = compile_step(mesh)
        for _ in range(2):
            state, _ = run(state, sharding.put_batch(random_batch(0), mesh))
        for x, sharded in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert x.sharding.is_equivalent_to(sharded, x.ndim)
    big = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.size > 1000]
    assert len(big) == 18 and all(x.addressable_shards[0].data.size == x.size // 2 for x in big)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_non_finite_gradient_or_moment_skips_the_update_and_is_counted(accumulation):
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    with sharding.use_mesh(mesh):
        state, run, *_ = compile_step(mesh, accumulation)
        state, _ = run(state, sharding.put_batch(random_batch(0), mesh))
        before = jax.device_get(state)
        poisoned = random_batch(1)
        poisoned["loss_weights"][3, 5] = np.nan
        state, metrics = run(state, sharding.put_batch(poisoned, mesh))
        after = jax.device_get(state)
        assert int(metrics["update_skipped"]) == 1 and not np.isfinite(metrics["loss"])
        assert (int(after.step), int(after.skipped)) == (2, 1)
        jax.tree.map(
            np.testing.assert_array_equal,
            (before.params, before.opt_state),
            (after.params, after.opt_state),
        )
        state, metrics = run(state, sharding.put_batch(random_batch(2), mesh))
        assert (
            int(metrics["update_skipped"]) == 0
            and np.isfinite(metrics["loss"])
            and int(state.skipped) == 1
        )
        clipping, adam, decay = state.opt_state
        kernel = np.asarray(state.params["head"]["kernel"])
        for moment, bad in (
            ("mu", np.nan),
            ("nu", np.nan),
            ("nu", np.inf),
        ):  # loss and gradient are finite then
            tree = getattr(adam, moment)
            spoiled = tree | {"head": {"kernel": tree["head"]["kernel"].at[3, 5].set(bad)}}
            given = jax.tree.map(
                jnp.copy,
                state.replace(opt_state=(clipping, adam._replace(**{moment: spoiled}), decay)),
            )
            after, metrics = run(given, sharding.put_batch(random_batch(3), mesh))
            assert (
                int(metrics["update_skipped"]) == 1
                and np.isfinite(metrics["loss"])
                and np.isfinite(metrics["grad_norm"])
            )
            np.testing.assert_array_equal(after.params["head"]["kernel"], kernel)


def test_update_is_adamw_of_optax_with_our_mask_and_clip():
    """One step, written again with optax.adamw."""
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        state, run, *_ = compile_step(mesh)
        params, batch = jax.device_get(state.params), random_batch(0)
        loss = lambda p: (lambda t: t[0] / t[1]["weight"])(  # noqa: E731
            objectives.next_token(p, batch, jnp.float32(1e4), TINY, 1e-4, 48)
        )
        grads = jax.jit(jax.grad(loss))(params)
        oracle = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(5e-4, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=optimizer.decay_mask),
        )
        updates, _ = oracle.update(grads, oracle.init(params), params)
        want = optax.apply_updates(params, updates)
        state, metrics = run(state, sharding.put_batch(batch, mesh))
    assert float(metrics["lr"]) == pytest.approx(5e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.device_get(state.params),
        jax.device_get(want),
    )
