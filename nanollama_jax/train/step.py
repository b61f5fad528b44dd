"""One training step and one validation step: pure functions of state and batch, compiled once per stage by the loop."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanollama_jax import sharding
from nanollama_jax.model import Llama, ModelConfig

Objective = Callable[[Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """All that training changes. `step` counts batches seen since the curriculum began, `skipped` the updates among them that were not applied."""

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any


def init_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> tuple[Callable[[], TrainState], Any, Any]:
    """`(make, shapes, shardings)`: nothing is allocated until `make()` is called, and then each device makes only its own part.

    `shapes` is a TrainState of ShapeDtypeStructs, `shardings` one of NamedShardings.
    """
    dummy = jnp.zeros((1, 8), jnp.int32)

    def boxed_params():
        return Llama(model).init(jax.random.key(seed), dummy, dummy, dummy, jnp.float32(10_000))["params"]

    def make() -> TrainState:
        params = nn.meta.unbox(boxed_params())
        return TrainState(step=jnp.int32(0), skipped=jnp.int32(0), params=params, opt_state=optimizer.init(params))

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
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and float32 scalars to log. Gradients are summed over micro-batches in float32 and divided once by the global weight, so
    that neither the number of devices nor of micro-batches changes what is optimised (with 16-bit activations, layers' gradients are summed
    over devices in 16 bits). If loss or gradient is not finite, the update is
    skipped and counted, and the state is otherwise that of before."""
    theta = rope_theta(state.step)
    gradient_of = jax.value_and_grad(objective, has_aux=True)
    if accumulation == 1:
        (_, sums), grads = gradient_of(state.params, batch, theta)
    else:

        def add_microbatch(carry, microbatch):
            (_, sums), grads = gradient_of(state.params, microbatch, theta)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        shapes = jax.eval_shape(lambda: gradient_of(state.params, jax.tree.map(lambda x: x[: x.shape[0] // accumulation], batch), theta))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
        (sums, grads), _ = jax.lax.scan(add_microbatch, zeros, sharding.split_microbatches(batch, accumulation))

    weight = jnp.maximum(sums["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    loss, grad_norm = sums["ce"] / weight, optax.tree.norm(grads)
    lr = learning_rate(state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)

    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    params, opt_state = jax.tree.map(functools.partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state))
    skipped = jnp.where(finite, 0, 1)
    new_state = TrainState(step=state.step + 1, skipped=state.skipped + skipped, params=params, opt_state=opt_state)
    metrics = {
        "loss": loss,
        "z": sums["z"] / weight,
        "grad_norm": grad_norm,
        "lr": lr,
        "rope_theta": theta,
        "learnt_tokens": sums["weight"],
        "update_skipped": skipped,
    }
    return new_state, metrics


def validation_step(params: Any, batch: dict[str, jax.Array], rope_theta: jax.Array, *, objective: Objective) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy (nats) and its weight (tokens) of one batch."""
    _, sums = objective(params, batch, rope_theta)
    return sums["ce"], sums["weight"]
