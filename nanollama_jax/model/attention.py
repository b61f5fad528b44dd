"""Causal attention with grouped key/value heads, masked to documents, behind one function.

Backends: `xla` materialises the scores in float32 and is the oracle and the CPU default; `cudnn` is plain causal flash attention (Hopper and
Ampere, 16-bit); `cudnn_packed` the same within documents (Hopper; flash_attention.py). A mask is never handed to cuDNN: jax turns it into a dense
bias, and before 0.11.2 its backward pass builds a dense gradient of it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nanollama_jax.errors import BadInput
from nanollama_jax.model.config import ModelConfig
from nanollama_jax.model.flash_attention import Packing, flash_attention, pack


class KVCache(NamedTuple):
    """One layer's keys (rotated) and values of up to S tokens, (B, K, S, H) each: token i of a row lies in slot i."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


def documents_of(segment_ids_BT: jax.Array, config: ModelConfig) -> jax.Array | Packing | None:
    """What `attend` wants to know of the documents in each row, the same for every layer. Padding is a segment like any other."""
    if config.attention == "cudnn_packed":
        return pack(segment_ids_BT, config.packed_documents)[0]
    return segment_ids_BT if config.document_mask else None


def merged_documents(segment_ids_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """How many documents of a batch attention takes for a part of the one before, for want of room: int32 scalar, 0 but for `cudnn_packed`."""
    return (
        jnp.sum(pack(segment_ids_BT, config.packed_documents)[1])
        if config.attention == "cudnn_packed"
        else jnp.int32(0)
    )


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    documents: jax.Array | Packing | None,
    config: ModelConfig,
) -> jax.Array:
    """Attention output (B, T, N, H). Query head n reads key/value head n // (N // K)."""
    if config.attention != "xla":
        return flash_attention(q_BTNH, k_BSKH, v_BSKH, documents)
    return checkpoint_name(xla_attention(q_BTNH, k_BSKH, v_BSKH, documents), "attention")


def xla_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Dense attention; softmax in float32 whatever the inputs. Masked scores weigh exactly 0, so other documents cannot move a bit.

    Queries go in blocks, each against the keys up to its own end: half the work of the full square, and on a CPU three to five times as fast
    as one einsum over it (forward and backward, 8/2 heads of 32, 256 and 1,024 tokens), since each product is then a plain batched matrix product.
    """
    B, T, N, H = q_BTNH.shape
    K, G = k_BSKH.shape[2], N // k_BSKH.shape[2]
    q_BKGTH = (
        (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype))
        .reshape(B, T, K, G, H)
        .transpose(0, 2, 3, 1, 4)
    )
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    position_T = jnp.arange(T)
    out = []
    block = min(
        max(64, T // 8), 512
    )  # bounds the scores: 4.5 GB instead of 10.4 for a 1B block at 16,384 tokens
    for start in range(0, T, block):
        end = min(start + block, T)
        q_BKQH = q_BKGTH[:, :, :, start:end].reshape(B, K, G * (end - start), H)
        scores_BKQS = jnp.einsum(
            "BKQH,BKSH->BKQS", q_BKQH, k_BKSH[:, :, :end], preferred_element_type=jnp.float32
        )
        mask_BTS = (position_T[start:end, None] >= position_T[:end])[None]
        if segment_ids_BT is not None:
            mask_BTS = mask_BTS & (
                segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
            )
        bias_BTS = jnp.where(
            mask_BTS, 0.0, jnp.finfo(jnp.float32).min
        )  # added, so that no mask of all heads' size is made
        scores_BKGTS = scores_BKQS.reshape(B, K, G, end - start, end) + bias_BTS[:, None, None]
        # Softmax, divided by its sum only after the product with the values: T x H quotients instead of T x S.
        top = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
        weights_BKGTS = jnp.exp(scores_BKGTS - top)
        sums = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
        weights_BKQS = weights_BKGTS.astype(v_BKSH.dtype).reshape(B, K, -1, end)
        mixed = jnp.einsum(
            "BKQS,BKSH->BKQH", weights_BKQS, v_BKSH[:, :, :end], preferred_element_type=jnp.float32
        )
        out.append((mixed.reshape(B, K, G, end - start, H) / sums).astype(v_BKSH.dtype))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def check_attention(config: ModelConfig, rows: int) -> None:
    """Raises BadInput if attention as `config` has it does not agree with `xla` here, forward and backward: kernels have been silently wrong before.

    Compares a small ragged batch, with the model's heads; `rows` is a multiple of the devices. Must be called inside `sharding.use_mesh`.
    """
    if config.attention == "xla":
        return
    T, N, K, H = 384, config.num_heads, config.num_kv_heads, config.head_dim
    lengths = [[T], [1, 100, 37, T - 138], [128, 128, T - 256]]  # of each row's documents
    segment_ids_BT = np.array(
        [
            np.repeat(np.arange(len(row)), row)
            for row in (lengths[i % len(lengths)] for i in range(rows))
        ],
        np.int32,
    )
    expected_config = dataclasses.replace(config, attention="xla", dtype="float32")

    @jax.jit
    def errors() -> jax.Array:
        """Of the output and the gradients of queries, keys and values: norm of the difference over the norm."""
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, d_out = (
            jax.random.normal(key, (rows, T, heads, H), config.dtype)
            for key, heads in zip(keys, (N, K, K, N), strict=True)
        )

        def run(config, *arrays):
            q, k, v, d_out = (x.astype(config.dtype) for x in arrays)
            out, gradients_of = jax.vjp(
                lambda *qkv: attend(*qkv, documents_of(segment_ids_BT, config), config), q, k, v
            )
            return out, *gradients_of(d_out)

        pairs = zip(run(config, q, k, v, d_out), run(expected_config, q, k, v, d_out), strict=True)
        return jnp.stack(
            [
                jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
                for ours, theirs in pairs
            ]
        )

    found = np.asarray(errors())
    if not (found < 2e-2).all():  # NaN is not below either; rounding to 16 bits is 3e-3
        of = ", ".join(
            f"{name} {error:.1e}"
            for name, error in zip(("output", "d query", "d key", "d value"), found, strict=True)
        )
        raise BadInput(
            f"model.attention={config.attention!r} is wrong on this machine (relative errors against xla: {of}): set model.attention=xla, and try "
            "another version of jax or cuDNN"
        )


def prefill_cache(k_BTKH: jax.Array, v_BTKH: jax.Array, cache: KVCache) -> KVCache:
    """The cache with the first T tokens of each row written."""
    written = (
        new_BTKH.swapaxes(1, 2).astype(old.dtype)
        for new_BTKH, old in zip((k_BTKH, v_BTKH), cache, strict=True)
    )
    return KVCache(
        *(
            jax.lax.dynamic_update_slice(old, new, (0, 0, 0, 0))
            for new, old in zip(written, cache, strict=True)
        )
    )


def decode_attention(
    q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array, positions_B1: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Attention output (B, 1, N, H) of one new token a row, at `positions_B1`, over itself and the cached tokens before it, and the cache with it.

    What slots after a row's position hold is masked, not assumed to be zero: rows of unequal length are padded on the right.
    """
    B, _, N, H = q_B1NH.shape
    K, S = cache.k_BKSH.shape[1:3]
    rows = jnp.arange(B)
    cache = KVCache(
        *(
            old.at[rows, :, positions_B1[:, 0]].set(new[:, 0].astype(old.dtype))
            for old, new in zip(cache, (k_B1KH, v_B1KH), strict=True)
        )
    )
    q_BKGH = (q_B1NH * jnp.asarray(H**-0.5, q_B1NH.dtype)).reshape(B, K, N // K, H)
    scores_BKGS = jnp.einsum(
        "BKGH,BKSH->BKGS", q_BKGH, cache.k_BKSH, preferred_element_type=jnp.float32
    )
    visible_BS = jnp.arange(S) <= positions_B1
    weights_BKGS = jax.nn.softmax(
        jnp.where(visible_BS[:, None, None], scores_BKGS, jnp.finfo(jnp.float32).min), axis=-1
    )
    out_BKGH = jnp.einsum(
        "BKGS,BKSH->BKGH",
        weights_BKGS.astype(cache.v_BKSH.dtype),
        cache.v_BKSH,
        preferred_element_type=jnp.float32,
    )
    return out_BKGH.astype(q_B1NH.dtype).reshape(B, 1, N, H), cache
