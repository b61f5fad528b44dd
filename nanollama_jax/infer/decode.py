"""The compiled half of the engine: pure functions of parameters and state. `prefill` writes the beginning of each row into a preallocated cache,
`decode` goes on from there on the device, `token_logprobs` scores whole rows. All take the model's parameters unrolled (`layers_0`, ...).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import with_logical_constraint as constrain

from nanollama_jax.infer.sampling import choose
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.model.attention import KVCache

NOT_FINITE = -2  # in place of a token
HEAD_TOKENS = 1024  # whose logits exist at a time when scoring


class DecodeState(NamedTuple):
    """All that decoding changes; one entry a row."""

    caches: tuple[KVCache, ...]  # one a layer
    token_B: jax.Array  # the newest token, not yet in the cache
    position_B: jax.Array  # its position
    last_B: jax.Array  # the position at which the row ends at the latest
    stream_B: jax.Array  # its stream of random numbers
    done_B: jax.Array
    seen_BV: jax.Array | None  # tokens that occurred, for the repetition penalty


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    params: Any, tokens_BT: jax.Array, rope_theta: jax.Array, *, model: ModelConfig, slots: int
) -> tuple[KVCache, ...]:
    """Caches of `slots` tokens a row that hold `tokens_BT` (T > 1, padded on the right: what padding wrote is never looked at)."""
    B, _ = tokens_BT.shape
    empty = constrain(
        jnp.zeros((B, model.num_kv_heads, slots, model.head_dim), model.dtype),
        ("batch", "kv_heads", "length", "head_dim"),
    )
    _, caches = forward(
        params,
        tokens_BT,
        rope_theta,
        model,
        tuple(KVCache(empty, empty) for _ in range(model.num_layers)),
    )
    return caches


@functools.partial(
    jax.jit, static_argnames=("model", "steps", "switches", "pieces"), donate_argnames="state"
)
def decode(
    params: Any,
    state: DecodeState,
    allowed_BW: jax.Array | None,
    stop_ids: jax.Array,
    rope_theta: jax.Array,
    sampling: dict[str, jax.Array],
    *,
    model: ModelConfig,
    steps: int,
    switches: frozenset[str],
    pieces: int,
) -> tuple[jax.Array, DecodeState]:
    """Up to `steps` new tokens a row, (B, steps) int32, -1 where a row had ended; stops early when all have. `allowed_BW` is a grammar's mask:
    bit v % 32 of word v // 32 says whether token v may come (int32). `sampling` and `switches` are those of `Sampling`. Ids from `pieces`, the
    tokenizer's size, on are never chosen. A row whose logits are not finite ends with NOT_FINITE."""
    B = state.token_B.shape[0]

    def step(carry):
        i, out_BC, state = carry
        hidden_B1D, caches = forward(
            params,
            state.token_B[:, None],
            rope_theta,
            model,
            state.caches,
            state.position_B[:, None],
        )
        logits_BV = head(params, hidden_B1D[:, 0])
        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
        token_V = jnp.arange(model.vocab_size)
        if pieces < model.vocab_size:
            logits_BV = jnp.where(token_V < pieces, logits_BV, -jnp.inf)
        if allowed_BW is not None:
            logits_BV = jnp.where(
                (allowed_BW[:, token_V // 32] >> (token_V % 32)) & 1, logits_BV, -jnp.inf
            )
        seen_BV = (
            None
            if state.seen_BV is None
            else state.seen_BV.at[jnp.arange(B), state.token_B].set(True)
        )
        chosen_B = choose(logits_BV, seen_BV, state.stream_B, state.position_B, sampling, switches)
        chosen_B = jnp.where(finite_B, chosen_B, NOT_FINITE)
        token_B = jnp.where(state.done_B, state.token_B, chosen_B)
        position_B = jnp.where(state.done_B, state.position_B, state.position_B + 1)
        out_BC = out_BC.at[:, i].set(jnp.where(state.done_B, -1, token_B))
        done_B = (
            state.done_B
            | (token_B[:, None] == stop_ids).any(axis=1)
            | (position_B >= state.last_B)
            | ~finite_B
        )
        return (
            i + 1,
            out_BC,
            DecodeState(caches, token_B, position_B, state.last_B, state.stream_B, done_B, seen_BV),
        )

    def unfinished(carry):
        i, _, state = carry
        return (i < steps) & ~jnp.all(state.done_B)

    out_BC = constrain(jnp.full((B, steps), -1, jnp.int32), ("batch", None))
    _, out_BC, state = jax.lax.while_loop(unfinished, step, (0, out_BC, state))
    return out_BC, state


@functools.partial(jax.jit, static_argnames="model")
def token_logprobs(
    params: Any, tokens_BT: jax.Array, rope_theta: jax.Array, *, model: ModelConfig
) -> jax.Array:
    """Natural-log probability of each token, given those before it in its row: (B, T) float32, 0 for the first."""
    B, T = tokens_BT.shape
    hidden_BTD = forward(params, tokens_BT, rope_theta, model)
    C = min(T, 1 << max(1, HEAD_TOKENS // B).bit_length() - 1)  # a power of two, as T is

    def of_chunk(hidden_and_targets):
        hidden_BCD, targets_BC = hidden_and_targets
        logits_BCV = head(params, hidden_BCD)
        at_target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return at_target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    def chunks(x_BT):
        return x_BT.reshape(B, T // C, C, *x_BT.shape[2:]).swapaxes(0, 1)

    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    logprobs_BT = (
        jax.lax.map(of_chunk, (chunks(hidden_BTD), chunks(targets_BT))).swapaxes(0, 1).reshape(B, T)
    )
    return jnp.roll(logprobs_BT, 1, axis=1).at[:, 0].set(0.0)


@functools.partial(jax.jit, static_argnames="model")
def logits(
    params: Any, tokens_BT: jax.Array, rope_theta: jax.Array, *, model: ModelConfig
) -> jax.Array:
    """(B, T, V) float32."""
    return head(params, forward(params, tokens_BT, rope_theta, model))


def forward(params, tokens_BT, rope_theta, model, caches=None, positions_BT=None):
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions_BT is None else positions_BT
    return Llama(model).apply(
        {"params": params}, tokens_BT, positions_BT, jnp.ones((B, T), jnp.int32), rope_theta, caches
    )


def head(params: Any, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) float32 of hidden states (..., D)."""
    return jnp.einsum(
        "...D,DV->...V", hidden, params["head"]["kernel"], preferred_element_type=jnp.float32
    )
