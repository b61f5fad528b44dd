"""Causal attention with grouped key/value heads, masked to documents, behind one function.

Backends: `xla` materialises the scores in float32 and is the oracle and the CPU default; `cudnn` is plain causal flash attention (Hopper and
Ampere, 16-bit). A mask is never handed to cuDNN: jax turns it into a dense bias, and before 0.11.2 its backward pass builds a dense gradient of it.
"""

import jax
import jax.numpy as jnp

from nanollama_jax.model.config import ModelConfig


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Attention output (B, T, N, H). Query head n reads key/value head n // (N // K). Padding is a segment like any other."""
    if config.attention == "cudnn":
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")
    return xla_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT if config.document_mask else None)


def xla_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Dense attention; softmax in float32 whatever the inputs. Masked scores weigh exactly 0, so other documents cannot move a bit.

    Queries go in blocks, each against the keys up to its own end: half the work of the full square, and on a CPU three to five times as fast
    as one einsum over it (forward and backward, 8/2 heads of 32, 256 and 1,024 tokens), since each product is then a plain batched matrix product.
    """
    B, T, N, H = q_BTNH.shape
    K, G = k_BSKH.shape[2], N // k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    position_T = jnp.arange(T)
    out = []
    block = max(64, T // 8)
    for start in range(0, T, block):
        end = min(start + block, T)
        q_BKQH = q_BKGTH[:, :, :, start:end].reshape(B, K, G * (end - start), H)
        scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH[:, :, :end], preferred_element_type=jnp.float32)
        mask_BTS = (position_T[start:end, None] >= position_T[:end])[None]
        if segment_ids_BT is not None:
            mask_BTS = mask_BTS & (segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end])
        bias_BTS = jnp.where(mask_BTS, 0.0, jnp.finfo(jnp.float32).min)  # added, so that no mask of all heads' size is made
        scores_BKGTS = scores_BKQS.reshape(B, K, G, end - start, end) + bias_BTS[:, None, None]
        # Softmax, divided by its sum only after the product with the values: T x H quotients instead of T x S.
        top = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
        weights_BKGTS = jnp.exp(scores_BKGTS - top)
        sums = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
        weights_BKQS = weights_BKGTS.astype(v_BKSH.dtype).reshape(B, K, -1, end)
        mixed = jnp.einsum("BKQS,BKSH->BKQH", weights_BKQS, v_BKSH[:, :, :end], preferred_element_type=jnp.float32)
        out.append((mixed.reshape(B, K, G, end - start, H) / sums).astype(v_BKSH.dtype))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
