"""Causal attention with grouped key/value heads, masked to documents, behind one function.

Backends:
- `xla` materializes the scores in float32. It is the oracle and the CPU default.
- `cudnn` is plain causal flash attention (16-bit; Ampere and Hopper).
- `cudnn_packed` is flash attention within documents (16-bit; Hopper; flash_attention.py).

cuDNN never gets a dense mask: jax turns one into a dense bias, and before 0.11.2 the backward pass
materializes a dense gradient of that bias.
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
    """One layer's rotated keys and values, (B, K, S, H): slot i holds token i, up to S tokens."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


def documents_of(segment_ids_BT: jax.Array, config: ModelConfig) -> jax.Array | Packing | None:
    """The document layout that `attend` takes, shared by all layers. Padding is its own segment."""
    if config.attention == "cudnn_packed":
        return pack(segment_ids_BT, config.packed_documents)[0]
    return segment_ids_BT if config.document_mask else None


def merged_documents(segment_ids_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Documents that attention merges into their predecessor: int32 scalar.

    Only `cudnn_packed` merges, when `packed_documents` is too small.
    """
    if config.attention != "cudnn_packed":
        return jnp.int32(0)
    return jnp.sum(pack(segment_ids_BT, config.packed_documents)[1])


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
    """Dense attention with a float32 softmax. A masked score has weight exactly 0.

    Queries are processed in blocks, each against the keys up to the block's end. That is half the
    work of the full square. On a CPU it is three to five times as fast as one einsum over the full
    square (forward and backward, 8/2 heads of 32, 256 and 1,024 tokens), since each product is then
    a plain batched matrix product.
    """
    B, T, N, H = q_BTNH.shape
    K, G = k_BSKH.shape[2], N // k_BSKH.shape[2]
    q_BTNH = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    position_T = jnp.arange(T)
    out = []
    # Bounds the scores: 4.5 GB instead of 10.4 for a 1B block at 16,384 tokens
    block = min(max(64, T // 8), 512)
    for start in range(0, T, block):
        end = min(start + block, T)
        q_BKQH = q_BKGTH[:, :, :, start:end].reshape(B, K, G * (end - start), H)
        scores_BKQS = jnp.einsum(
            "BKQH,BKSH->BKQS", q_BKQH, k_BKSH[:, :, :end], preferred_element_type=jnp.float32
        )
        mask_BTS = (position_T[start:end, None] >= position_T[:end])[None]
        if segment_ids_BT is not None:
            same_document_BTS = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
            mask_BTS = mask_BTS & same_document_BTS
        # A bias, so that no mask is made for every head
        bias_BTS = jnp.where(mask_BTS, 0.0, jnp.finfo(jnp.float32).min)
        scores_BKGTS = scores_BKQS.reshape(B, K, G, end - start, end) + bias_BTS[:, None, None]
        # Divided by the softmax's sum only after the product: T x H quotients instead of T x S
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
    """Raises BadInput if `config`'s attention disagrees with `xla` on this machine.

    Compares outputs and gradients on a small ragged batch with the model's heads: kernels have been
    silently wrong before. `rows` is a multiple of the device count. Call in `sharding.use_mesh`.
    """
    if config.attention == "xla":
        return
    T, N, K, H = 384, config.num_heads, config.num_kv_heads, config.head_dim
    lengths = [[T], [1, 100, 37, T - 138], [128, 128, T - 256]]  # documents of each row
    segment_ids_BT = np.zeros((rows, T), np.int32)
    for i in range(rows):
        row = lengths[i % len(lengths)]
        segment_ids_BT[i] = np.repeat(np.arange(len(row)), row)
    expected_config = dataclasses.replace(config, attention="xla", dtype="float32")

    @jax.jit
    def errors() -> jax.Array:
        """Relative error (norm of the difference / norm) of the output and of dq, dk, dv."""
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

        relative_errors = []
        for ours, xla in zip(
            run(config, q, k, v, d_out), run(expected_config, q, k, v, d_out), strict=True
        ):
            difference = ours.astype(jnp.float32) - xla
            relative_errors.append(jnp.linalg.norm(difference) / jnp.linalg.norm(xla))
        return jnp.stack(relative_errors)

    found = np.asarray(errors())
    if not (found < 2e-2).all():  # False for NaN; rounding to 16 bits gives 3e-3
        names = ("output", "d query", "d key", "d value")
        listed = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, found, strict=True))
        raise BadInput(
            f"model.attention={config.attention!r} is wrong on this machine (relative errors "
            f"against xla: {listed}): set model.attention=xla, or try another version of jax or "
            "cuDNN"
        )


def prefill_cache(k_BTKH: jax.Array, v_BTKH: jax.Array, cache: KVCache) -> KVCache:
    """The cache with the first T tokens of each row written."""

    def write(old_BKSH, new_BTKH):
        new_BKTH = new_BTKH.swapaxes(1, 2).astype(old_BKSH.dtype)
        return jax.lax.dynamic_update_slice(old_BKSH, new_BKTH, (0, 0, 0, 0))

    return KVCache(write(cache.k_BKSH, k_BTKH), write(cache.v_BKSH, v_BTKH))


def decode_attention(
    q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array, positions_B1: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Attention of one new token per row, at `positions_B1`, over the cache and itself.

    Returns the output (B, 1, N, H) and the cache with the new token. Slots beyond a row's position
    are masked, not assumed to be zero: rows of unequal length are padded on the right.
    """
    B, _, N, H = q_B1NH.shape
    K, S = cache.k_BKSH.shape[1:3]

    def write(old_BKSH, new_B1KH):
        new_BKH = new_B1KH[:, 0].astype(old_BKSH.dtype)
        return old_BKSH.at[jnp.arange(B), :, positions_B1[:, 0]].set(new_BKH)

    cache = KVCache(write(cache.k_BKSH, k_B1KH), write(cache.v_BKSH, v_B1KH))
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
