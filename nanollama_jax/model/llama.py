"""The decoder: tokens in, final hidden states out.

The head's weights live here, but the loss applies them chunk by chunk (`train/losses.py`), so
full-size logits never exist in training; `logits` is for everything else.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import with_logical_constraint as constrain
from jax.ad_checkpoint import checkpoint_name

from nanollama_jax.model.attention import (
    KVCache,
    Packing,
    attend,
    decode_attention,
    documents_of,
    prefill_cache,
)
from nanollama_jax.model.config import REMAT_POLICIES, ModelConfig
from nanollama_jax.model.rope import apply_rope, rope_table

INIT_STDDEV = 0.02
HIDDEN = ("batch", "length", "act_embed")  # logical axes of hidden_BTD


class Weight(nn.Module):
    """A float32 parameter, given in the compute dtype and whole to each device."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str | None  # None: as stored, in its own sharding
    stddev: float = INIT_STDDEV

    @nn.compact
    def __call__(self) -> jax.Array:
        # Scaled before truncation at 2 sigma, like torch's trunc_normal_ at +-2 * std
        init = nn.with_logical_partitioning(
            nn.initializers.truncated_normal(self.stddev), self.axes
        )
        kernel = self.param("kernel", init, self.shape, jnp.float32)
        if self.dtype is None:
            return kernel
        # Cast, then gathered: half the bytes. Without the constraint XLA gathers activations
        return constrain(kernel.astype(self.dtype), (None,) * kernel.ndim)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Root-mean-square norm (arXiv:1910.07467), computed in float32, in the input's dtype."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", init, x_BTD.shape[-1:], jnp.float32)
        x_f32 = x_BTD.astype(jnp.float32)
        x_f32 = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps)
        return (x_f32 * scale_D).astype(x_BTD.dtype)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        documents: jax.Array | Packing | None,
        rope: tuple[jax.Array, jax.Array],
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """With a cache: one token per row is a decode step, several are the prefill of the row."""
        c = self.config
        D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        # Heads of queries, keys and values, in this order
        qkv_DNH = Weight((D, N + 2 * K, H), ("embed", "heads", "head_dim"), c.dtype, name="qkv")()
        qk_BTNH, v_BTKH = jnp.split(project(x_BTD, qkv_DNH), [N + K], axis=2)
        q_BTNH, k_BTKH = jnp.split(apply_rope(qk_BTNH, *rope), [N], axis=2)
        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, "qkv") for x in (q_BTNH, k_BTKH, v_BTKH))
        # For attention maps; a no-op unless "intermediates" is mutable
        self.sow("intermediates", "q_and_k", (q_BTNH, k_BTKH))
        if cache is not None and x_BTD.shape[1] == 1:
            out_BTNH, cache = decode_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT, cache)
        else:
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, documents, c)
            cache = cache and prefill_cache(k_BTKH, v_BTKH, cache)
        o_NHD = Weight(
            (N, H, D), ("heads", "head_dim", "embed"), c.dtype, residual_stddev(c), name="o"
        )()
        out_BTD = project(out_BTNH.reshape(*x_BTD.shape[:2], N * H), o_NHD.reshape(N * H, D))
        return checkpoint_name(out_BTD, "o"), cache


class FeedForward(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """SwiGLU (arXiv:2002.05202)."""
        c = self.config
        gate_up_D2F = Weight(
            (c.d_model, 2, c.ffn_dim), ("embed", None, "ffn"), c.dtype, name="gate_up"
        )()
        gate_up_BT2F = checkpoint_name(project(x_BTD, gate_up_D2F), "gate_up")
        gate_BTF, up_BTF = gate_up_BT2F[:, :, 0], gate_up_BT2F[:, :, 1]
        down_FD = Weight(
            (c.ffn_dim, c.d_model), ("ffn", "embed"), c.dtype, residual_stddev(c), name="down"
        )()
        return project(nn.silu(gate_BTF) * up_BTF, down_FD)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden_BTD: jax.Array,
        positions_BT: jax.Array,
        documents: jax.Array | Packing | None,
        rope: tuple[jax.Array, jax.Array],
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Pre-norm attention, then pre-norm feed-forward. `cache` is None in training."""
        c = self.config
        hidden_BTD = constrain(hidden_BTD, HIDDEN)
        normed_BTD = RMSNorm(c.norm_eps, name="attention_norm")(hidden_BTD)
        attended_BTD, cache = Attention(c, name="attention")(
            normed_BTD, positions_BT, documents, rope, cache
        )
        hidden_BTD = constrain(hidden_BTD + attended_BTD, HIDDEN)
        hidden_BTD += FeedForward(c, name="ffn")(RMSNorm(c.norm_eps, name="ffn_norm")(hidden_BTD))
        return constrain(hidden_BTD, HIDDEN), cache


class Llama(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        rope_theta: jax.Array,
        caches: tuple[KVCache, ...] | None = None,
    ) -> jax.Array | tuple[jax.Array, tuple[KVCache, ...]]:
        """Final hidden states (B, T, D), normed, in `config.dtype`.

        Integer inputs are int32; `rope_theta` is a traced float32 scalar. With `caches`, one per
        (unrolled) layer, returns `(hidden, caches)`: see `Attention`.
        """
        c = self.config
        embedding_VD = Weight(
            (c.vocab_size, c.d_model), ("vocab", "embed"), None, name="embedding"
        )()
        # Applied by the loss
        Weight((c.d_model, c.vocab_size), ("embed", "vocab"), None, name="head")()
        hidden_BTD = constrain(embed(embedding_VD, tokens_BT, c.dtype), HIDDEN)
        rope = rope_table(positions_BT, c.head_dim, rope_theta)
        shared = (positions_BT, documents_of(segment_ids_BT, c), rope)

        block = Block
        if c.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*REMAT_POLICIES[c.remat])
            block = nn.remat(Block, policy=policy, prevent_cse=not c.scan_layers)
        if c.scan_layers:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            hidden_BTD, _ = layers(c, name="layers")(hidden_BTD, *shared)
        else:
            updated = []
            for i in range(c.num_layers):
                cache = caches and caches[i]
                hidden_BTD, cache = block(c, name=f"layers_{i}")(hidden_BTD, *shared, cache)
                updated.append(cache)
        hidden_BTD = RMSNorm(c.norm_eps, name="final_norm")(hidden_BTD)
        return hidden_BTD if caches is None else (hidden_BTD, tuple(updated))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(embedding_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table, (B, T, D) in `dtype`.

    The table is cast before the lookup, but its gradient is summed in float32: in bfloat16 the
    gradient of a token that occurs 1,900 times is 8 % off.
    """
    return constrain(embedding_VD.astype(dtype), (None, None))[tokens_BT]


def _embed_forward(embedding_VD, tokens_BT, dtype):
    return embed(embedding_VD, tokens_BT, dtype), (embedding_VD, tokens_BT)


def _embed_backward(dtype, residuals, d_hidden_BTD):
    embedding_VD, tokens_BT = residuals  # the table only for its shape and dtype
    zeros_VD = jnp.zeros_like(embedding_VD)
    d_embedding_VD = zeros_VD.at[tokens_BT].add(d_hidden_BTD.astype(embedding_VD.dtype))
    return constrain(d_embedding_VD, ("vocab", "embed")), None


embed.defvjp(_embed_forward, _embed_backward)


def project(x_BTD: jax.Array, weight: jax.Array) -> jax.Array:
    """(B, T, D) times (D, ...) as one product of two matrices.

    For an einsum over B and T, XLA transposes operands to get the weight's gradient: on a CPU that
    took a sixth of the nano step.
    """
    B, T, D = x_BTD.shape
    return (x_BTD.reshape(B * T, D) @ weight.reshape(D, -1)).reshape(B, T, *weight.shape[1:])


def residual_stddev(config: ModelConfig) -> float:
    """Smaller by 1/sqrt(2 * layers), as in GPT-2: the residual's variance does not grow with depth.

    For weights that write to the residual stream.
    """
    return INIT_STDDEV / (2 * config.num_layers) ** 0.5


def logits(
    config: ModelConfig, params, tokens_BT, positions_BT, segment_ids_BT, rope_theta
) -> jax.Array:
    """Logits (B, T, V) float32 of whole rows; `params` is the unboxed tree under "params"."""
    hidden_BTD = Llama(config).apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, jnp.float32(rope_theta)
    )
    head_DV = params["head"]["kernel"].astype(hidden_BTD.dtype)
    return jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The parameter tree with layers unrolled (`layers_0`, ...); an unrolled tree is unchanged."""
    if "layers" not in params:
        return params
    num_layers = params["layers"]["ffn_norm"]["scale"].shape[0]
    layers = {
        f"layers_{i}": jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])
        for i in range(num_layers)
    }
    return {name: value for name, value in params.items() if name != "layers"} | layers


def param_shapes(model: ModelConfig) -> Any:
    """The parameters of a model as jax.ShapeDtypeStructs, without computing anything."""
    ids = np.zeros((1, 8), np.int32)
    init = Llama(dataclasses.replace(model, attention="xla", remat="none")).init
    # Unboxed inside: outside, within a mesh, unboxing would constrain shapes without a sharding
    return jax.eval_shape(
        lambda: nn.meta.unbox(init(jax.random.key(0), ids, ids, ids, np.float32(10_000))["params"])
    )


def stack_layers(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The inverse of `unstack_layers`, on the host."""
    layers = [params[f"layers_{i}"] for i in range(num_layers)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *layers)
    others = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return others | {"layers": stacked}
