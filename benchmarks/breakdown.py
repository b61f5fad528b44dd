"""Where a training step's time goes on a GPU.

Its parts are measured separately, at the step's own shapes, next to the whole step; the difference
is the rest.
"""

import numpy as np

from benchmarks.cases import Case, Row
from benchmarks.documents import draw_batches
from benchmarks.kernels import Attention, product_shapes, time_products
from benchmarks.timing import seconds_per_call
from benchmarks.train import TOKENS, case_of_ours, our_config, packed_documents
from nanollama_jax.recipes import MODELS

# With this remat policy no product is recomputed in the backward pass
ATTENTION, REMAT, ACCUMULATION = "cudnn_packed", "products", 2
PRODUCTS = ("gate_up", "down", "qkv", "o")  # the loss includes the head's
COLUMNS = {
    "call_ms": ("ms/call", ".3f"),
    "calls": ("calls", ",.0f"),
    "step_seconds": ("s/step", ".4f"),
    "spread": ("+-", ".1%"),
}


def gpu_cases(scale: str, seq_len: int, rounds: int, steps: int) -> list[Case]:
    """The whole step, and each part: time per call times calls in a step of 65,536 tokens."""
    rows = max(1, TOKENS // ACCUMULATION // seq_len)
    about = dict(scale=scale, seq_len=seq_len, rows=rows, rounds=rounds)
    products = [
        Case(f"products, {name}", measure_products, (about | dict(name=name),)) for name in PRODUCTS
    ]
    parts = {
        "attention": measure_attention,
        "loss, with the head": measure_loss,
        "optimizer, with clipping": measure_optimizer,
        "embedding": measure_embedding,
    }
    whole = case_of_ours(scale, seq_len, [(ATTENTION, REMAT, ACCUMULATION)], rounds, steps)
    return [whole, *products, *(Case(name, measure, (about,)) for name, measure in parts.items())]


def rest(rows: list[Row]) -> list[str]:
    """Each part's share of the step, and the rest. Parts that were not measured are named."""
    step = rows[0].get("step_seconds") if rows else None
    if step is None:
        return ["no shares: the whole step was not measured"]
    parts = rows[1:]
    measured = [row for row in parts if "step_seconds" in row]
    lines = [f"{row['step_seconds'] / step:6.1%}  {row['case']}" for row in measured]
    explained = sum(row["step_seconds"] for row in measured)
    lines.append(
        f"{1 - explained / step:6.1%}  the rest: norms, RoPE, SwiGLU, residual sums, casts, sums "
        "over micro-batches, gaps between kernels"
    )
    if missing := [row["case"] for row in parts if row not in measured]:
        lines.append(f"the rest includes what was not measured: {', '.join(missing)}")
    return ["of the step:", *lines]


def measure_products(*, scale: str, seq_len: int, rows: int, rounds: int, name: str) -> Row:
    """All layers' weights of this name: forward and both gradients."""
    shape = MODELS[scale]
    seconds = time_products(*product_shapes(shape, rows * seq_len, chunk=1)[name], rounds=rounds)
    return part(sum(seconds.values()), None, shape["num_layers"] * ACCUMULATION)


def part(seconds: float, spread: float | None, calls: int) -> Row:
    return {
        "call_ms": 1e3 * seconds,
        "calls": calls,
        "step_seconds": seconds * calls,
        "spread": spread,
    }


def resolved(scale: str, seq_len: int, rows: int, **model):
    """The config of a step of one micro-batch, its model, a one-device mesh, and a batch on it."""
    import jax

    from nanollama_jax import sharding
    from nanollama_jax.train.settle import settle

    defaults = dict(attention=ATTENTION, remat=REMAT, packed_documents=packed_documents(seq_len))
    config = our_config(scale, seq_len, rows * len(jax.devices()), **defaults | model)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    (batch,) = draw_batches(1, rows, seq_len, config.model.vocab_size)
    return config, settle(config), mesh, sharding.put_batch(batch, mesh)


def measure_attention(*, scale: str, seq_len: int, rows: int, rounds: int, **model) -> Row:
    """Forward and backward, with documents like those of the step."""
    import jax

    from nanollama_jax import sharding

    _, model, mesh, batch = resolved(scale, seq_len, rows, **model)
    with sharding.use_mesh(mesh):
        attention = Attention(
            model.attention,
            (model.num_heads, model.num_kv_heads, model.head_dim),
            model.packed_documents,
            model.dtype,
        )
        arrays, (documents, _) = (
            attention.draw(rows, seq_len),
            attention.documents(batch["segment_ids"]),
        )
        timed = seconds_per_call(
            lambda: attention.both(*arrays, documents), jax.block_until_ready, rounds
        )
    return part(*timed, ACCUMULATION * model.num_layers)


def measure_loss(*, scale: str, seq_len: int, rows: int, rounds: int, **model) -> Row:
    """The loss and the gradients of hidden states and head."""
    import jax

    from nanollama_jax import sharding
    from nanollama_jax.train.losses import cross_entropy

    config, model, mesh, batch = resolved(scale, seq_len, rows, **model)

    def loss(hidden, head):
        return cross_entropy(
            hidden,
            head,
            batch["targets"],
            batch["loss_weights"],
            config.loss.z_loss,
            config.loss.chunk_tokens,
        )[0]

    with sharding.use_mesh(mesh):
        hidden = jax.random.normal(jax.random.key(0), (rows, seq_len, model.d_model), model.dtype)
        head = 0.02 * jax.random.normal(jax.random.key(1), (model.d_model, model.vocab_size))
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        timed = seconds_per_call(lambda: both(hidden, head), jax.block_until_ready, rounds)
    return part(*timed, ACCUMULATION)


def measure_embedding(*, scale: str, seq_len: int, rows: int, rounds: int, **model) -> Row:
    """Looking up, and the table's gradient."""
    import jax

    from nanollama_jax import sharding
    from nanollama_jax.model.llama import embed

    _, model, mesh, batch = resolved(scale, seq_len, rows, **model)
    with sharding.use_mesh(mesh):
        table = jax.random.normal(jax.random.key(0), (model.vocab_size, model.d_model))
        d_hidden = jax.random.normal(jax.random.key(1), (rows, seq_len, model.d_model), model.dtype)

        def look_up(table, d_hidden):
            hidden, gradient_of = jax.vjp(
                lambda table: embed(table, batch["tokens"], model.dtype), table
            )
            return hidden, gradient_of(d_hidden)

        both = jax.jit(look_up)
        timed = seconds_per_call(lambda: both(table, d_hidden), jax.block_until_ready, rounds)
    return part(*timed, ACCUMULATION)


def measure_optimizer(*, scale: str, seq_len: int, rows: int, rounds: int, **model) -> Row:
    """The update of parameters and moments, and the matrices' cast.

    The state is donated, as in the step.
    """
    import jax
    import jax.numpy as jnp

    from nanollama_jax import sharding
    from nanollama_jax.train import optimizer, step

    config, model, mesh, _ = resolved(scale, seq_len, rows, **model)
    adamw = optimizer.make_optimizer(
        **{
            name: config.optimizer[name]
            for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")
        }
    )

    def update(state, grads):
        updates, opt_state = adamw.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - 1e-4 * u, state.params, updates)
        return state.replace(params=params, opt_state=opt_state), step.cast_matrices(
            params, model.dtype
        )

    with sharding.use_mesh(mesh):
        make, _, _ = step.init_state(model, adamw, mesh, seed=0)
        state = make()
        grads = jax.tree.map(lambda x: jnp.full_like(x, np.float32(1e-4)), state.params)
        update = jax.jit(update, donate_argnums=0)

        def call():
            nonlocal state
            state, cast = update(state, grads)
            return state.step, cast

        timed = seconds_per_call(call, jax.block_until_ready, rounds)
    return part(*timed, 1)
