"""One training step and one validation step, pure functions of state and batch. `program` assembles
those of a stage, for the loop, tools/plan.py and tools/benchmark.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nanollama_jax import sharding
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.train import objectives, optimizer
from nanollama_jax.train.tasks import task_of

Objective = Callable[[Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """What training changes. `step` counts the batches since the start of the curriculum, `skipped`
    those whose update was not applied."""

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any


def init_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> tuple[Callable[[], TrainState], Any, Any]:
    """`(make, shapes, shardings)`. Nothing is allocated until `make()` is called; each device then
    makes only its own part.

    `shapes` is a TrainState of ShapeDtypeStructs, `shardings` one of NamedShardings.
    """
    dummy = np.zeros((1, 8), np.int32)  # of numpy, which needs no device (tools/plan.py)
    # Dense attention has the same parameters, and accepts a single short row.
    model = dataclasses.replace(model, attention="xla")

    def boxed_params():
        return Llama(model).init(jax.random.key(seed), dummy, dummy, dummy, np.float32(10_000))[
            "params"
        ]

    def make() -> TrainState:
        params = nn.meta.unbox(boxed_params())
        return TrainState(
            step=jnp.int32(0), skipped=jnp.int32(0), params=params, opt_state=optimizer.init(params)
        )

    shapes = jax.eval_shape(make)
    of_params = sharding.param_shardings(jax.eval_shape(boxed_params), mesh)
    whole = sharding.replicated(mesh)
    of_opt_state = sharding.shardings_like(shapes.opt_state, shapes.params, of_params, mesh)
    shardings = TrainState(step=whole, skipped=whole, params=of_params, opt_state=of_opt_state)
    return jax.jit(make, out_shardings=shardings), shapes, shardings


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    rope_theta: Callable[[jax.Array], jax.Array],
    accumulation: int,
    compute_dtype: str,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and float32 scalars to log.

    Gradients are summed over micro-batches in float32 and divided once by the global weight: the
    number of devices and micro-batches does not change what is optimised. (With 16-bit activations,
    the layers' gradients are summed over devices in 16 bits.) If loss, gradient or the
    optimizer's moments are not finite, the update is skipped and counted; only `step` advances.
    """
    theta = rope_theta(state.step)
    params = cast_matrices(state.params, compute_dtype)
    gradient_of = jax.value_and_grad(objective, has_aux=True)

    def sums_and_grads(microbatch):
        (_, sums), grads = gradient_of(params, microbatch, theta)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (sums, grads))

    if accumulation == 1:
        sums, grads = sums_and_grads(batch)
    else:
        microbatches = sharding.split_microbatches(batch, accumulation)
        shapes = jax.eval_shape(sums_and_grads, jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry, microbatch):
            return jax.tree.map(jnp.add, carry, sums_and_grads(microbatch)), None

        (sums, grads), _ = jax.lax.scan(add, zeros, microbatches)

    weight = jnp.maximum(sums["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    means, grad_norm = objectives.means(sums), optax.tree.norm(grads)
    lr = learning_rate(state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)

    # Of the old moments: the new ones would have to be computed twice or kept beside the old.
    finite = (
        jnp.isfinite(grad_norm)
        & jnp.isfinite(means["loss"])
        & jnp.isfinite(optax.tree.sum(state.opt_state))
    )
    params, opt_state = jax.tree.map(
        functools.partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state)
    )
    skipped = jnp.where(finite, 0, 1)
    new_state = TrainState(
        step=state.step + 1, skipped=state.skipped + skipped, params=params, opt_state=opt_state
    )
    metrics = means | {
        "grad_norm": grad_norm,
        "lr": lr,
        "rope_theta": theta,
        "learnt_tokens": sums["learnt_tokens"],
        "update_skipped": skipped,
        "merged_in_attention": sums["merged_in_attention"],
    }
    return new_state, metrics


def cast_matrices(params: Any, dtype: str) -> Any:
    """Casts the layers' matrices to the dtype of their products, once per step instead of once per
    micro-batch. Norms, embedding and head stay float32: their gradients are summed over tokens in
    float32."""

    def cast(path, x):
        is_matrix = path[0].key.startswith("layers") and path[-1].key == "kernel"
        return x.astype(dtype) if is_matrix else x

    return jax.tree.map_with_path(cast, params)


def validation_step(
    params: Any, batch: dict[str, jax.Array], rope_theta: jax.Array, *, objective: Objective
) -> objectives.Sums:
    """The objective's sums over one batch."""
    return objective(params, batch, rope_theta)[1]


class Program(NamedTuple):
    """What a stage computes. Nothing is compiled or allocated yet. Trace it inside
    `sharding.use_mesh(mesh)`."""

    make_state: Callable[[], TrainState]
    state_shapes: TrainState  # of ShapeDtypeStructs
    state_shardings: TrainState  # of NamedShardings
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    rope_theta: Callable[[jax.Array | int], jax.Array]
    update: Any  # jitted: (state, batch) -> (state, metrics); the state is donated
    measure: Any  # jitted: (params, batch, rope_theta) -> the objective's sums


def program(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Program:
    """The program of a stage. `model` is the config's, resolved."""
    task = task_of(config)
    adamw = optimizer.make_optimizer(
        **{k: config.optimizer[k] for k in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
    )
    rope_theta = functools.partial(
        optimizer.rope_theta_schedule,
        start_theta=config.rope.start_theta,
        end_theta=config.rope.end_theta,
        start_step=config.start_step,
        end_step=config.end_step,
        kind=config.rope.schedule,
    )
    learning_rate = functools.partial(
        optimizer.wsd_schedule, peak=config.optimizer.peak_lr, **config.schedule
    )
    objective = task.objective(config, model)
    make_state, shapes, shardings = init_state(model, adamw, mesh, config.seed)
    update = functools.partial(
        train_step,
        objective=objective,
        optimizer=adamw,
        learning_rate=learning_rate,
        rope_theta=rope_theta,
        accumulation=config.accumulation,
        compute_dtype=model.dtype,
    )
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    spec = task.batch_spec(config.batch_size, config.seq_len, config.data.max_segments)
    return Program(
        make_state=make_state,
        state_shapes=shapes,
        state_shardings=shardings,
        batch_shapes={name: array.update(sharding=rows) for name, array in spec.items()},
        rope_theta=rope_theta,
        update=jax.jit(
            update,
            donate_argnums=0,
            in_shardings=(shardings, None),
            out_shardings=(shardings, whole),
        ),
        measure=jax.jit(
            functools.partial(validation_step, objective=objective), out_shardings=whole
        ),
    )
