"""The compiled half of the engine: pure functions of parameters and state.

`prefill` writes prompts into a preallocated cache, `decode` generates from there on the device,
`token_logprobs` scores whole rows. All take unrolled parameters (`layers_0`, ...).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import with_logical_constraint as constrain

from nanollama_jax.infer.sampling import choose
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.model.attention import KVCache

NOT_FINITE = -2  # in place of a token
HEAD_TOKENS = 1024  # logits of so many tokens exist at a time when scoring


class DecodeState(NamedTuple):
    """All that decoding changes, by row."""

    caches: tuple[KVCache, ...]  # one per layer
    token_B: jax.Array  # the newest token, not yet in the cache
    position_B: jax.Array  # its position
    last_B: jax.Array  # the position at which the row ends at the latest
    stream_B: jax.Array  # the number of its random stream
    done_B: jax.Array
    seen_BV: jax.Array | None  # tokens that occurred, for the repetition penalty


def for_inference(model: ModelConfig, platform: str) -> ModelConfig:
    """The config to run `model` with on a platform ("gpu", "cpu").

    Rows are padded on the right, so plain causal attention (flash on a GPU) is correct.
    """
    dtype, attention = ("bfloat16", "cudnn") if platform == "gpu" else ("float32", "xla")
    return dataclasses.replace(
        model,
        dtype=dtype,
        attention=attention,
        document_mask=False,
        remat="none",
        scan_layers=False,
    )


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    params: Any, tokens_BT: jax.Array, rope_theta: jax.Array, *, model: ModelConfig, slots: int
) -> tuple[KVCache, ...]:
    """Caches of `slots` tokens per row that hold `tokens_BT`.

    T > 1. Rows are padded on the right; the cache entries of padding are never read.
    """
    B, _ = tokens_BT.shape
    empty = constrain(
        jnp.zeros((B, model.num_kv_heads, slots, model.head_dim), model.dtype),
        ("batch", "kv_heads", "length", "head_dim"),
    )
    caches = tuple(KVCache(empty, empty) for _ in range(model.num_layers))
    return forward(params, tokens_BT, rope_theta, model, caches)[1]


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
    """Up to `steps` new tokens per row: (B, steps) int32, -1 after a row's end.

    Stops early when all rows have ended. `allowed_BW` is a grammar's mask, int32: bit v % 32 of
    word v // 32 allows token v. `sampling` and `switches` are `Sampling.values` and
    `Sampling.switches`. Ids from `pieces` (the tokenizer's size) on are never chosen. A row whose
    logits are not finite ends with NOT_FINITE.
    """
    B = state.token_B.shape[0]

    def step(carry):
        i, out_BC, state = carry
        tokens_B1, positions_B1 = state.token_B[:, None], state.position_B[:, None]
        hidden_B1D, caches = forward(
            params, tokens_B1, rope_theta, model, state.caches, positions_B1
        )
        logits_BV = head(params, hidden_B1D[:, 0])
        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
        token_V = jnp.arange(model.vocab_size)
        if pieces < model.vocab_size:
            logits_BV = jnp.where(token_V < pieces, logits_BV, -jnp.inf)
        if allowed_BW is not None:
            allowed_BV = (allowed_BW[:, token_V // 32] >> (token_V % 32)) & 1
            logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(B), state.token_B].set(True)
        chosen_B = choose(logits_BV, seen_BV, state.stream_B, state.position_B, sampling, switches)
        chosen_B = jnp.where(finite_B, chosen_B, NOT_FINITE)
        token_B = jnp.where(state.done_B, state.token_B, chosen_B)
        position_B = jnp.where(state.done_B, state.position_B, state.position_B + 1)
        out_BC = out_BC.at[:, i].set(jnp.where(state.done_B, -1, token_B))
        stopped_B = (token_B[:, None] == stop_ids).any(axis=1)
        done_B = state.done_B | stopped_B | (position_B >= state.last_B) | ~finite_B
        state = DecodeState(
            caches, token_B, position_B, state.last_B, state.stream_B, done_B, seen_BV
        )
        return i + 1, out_BC, state

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
    """Natural-log probability of each token, given those before it in its row.

    (B, T) float32, 0 for the first token.
    """
    B, T = tokens_BT.shape
    hidden_BTD = forward(params, tokens_BT, rope_theta, model)
    C = min(T, 1 << max(1, HEAD_TOKENS // B).bit_length() - 1)  # a power of two, as T is

    def score_chunk(hidden_and_targets):
        hidden_BCD, targets_BC = hidden_and_targets
        logits_BCV = head(params, hidden_BCD)
        at_target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return at_target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    def chunks(x_BT):
        return x_BT.reshape(B, T // C, C, *x_BT.shape[2:]).swapaxes(0, 1)

    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    logprobs_NBC = jax.lax.map(score_chunk, (chunks(hidden_BTD), chunks(targets_BT)))
    logprobs_BT = logprobs_NBC.swapaxes(0, 1).reshape(B, T)
    return jnp.roll(logprobs_BT, 1, axis=1).at[:, 0].set(0.0)


@functools.partial(jax.jit, static_argnames="model")
def logits(
    params: Any, tokens_BT: jax.Array, rope_theta: jax.Array, *, model: ModelConfig
) -> jax.Array:
    """(B, T, V) float32."""
    return head(params, forward(params, tokens_BT, rope_theta, model))


def forward(params, tokens_BT, rope_theta, model, caches=None, positions_BT=None):
    """Hidden states of rows that each start at position 0, or are at `positions_BT` of a cache."""
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    one_document_BT = jnp.ones((B, T), jnp.int32)
    return Llama(model).apply(
        {"params": params}, tokens_BT, positions_BT, one_document_BT, rope_theta, caches
    )


def head(params: Any, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) float32 of hidden states (..., D)."""
    return jnp.einsum(
        "...D,DV->...V", hidden, params["head"]["kernel"], preferred_element_type=jnp.float32
    )
