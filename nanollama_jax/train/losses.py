"""Cross-entropy with z-loss over a large vocabulary, in chunks of tokens, so that the full (tokens, vocabulary) logits never exist.

The gradients of the loss with respect to hidden states and head are formed during the forward pass, while a chunk's logits are at hand, and
only scaled in the backward pass: three matrix products per chunk, none of them twice.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama_jax.sharding import differs_by_shard, on_each_batch_shard


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss: float, chunk_tokens: int):
    """Sums over all tokens of all devices, not means: `(total, ce, z, weight)`, float32 scalars, of which only `total` has a gradient.

    total = sum_i w_i * (ce_i + z_loss * z_i), with ce_i = logsumexp(logits_i) - logits_i[target_i] and z_i = logsumexp(logits_i)^2 (the
    z-loss of PaLM, arXiv:2204.02311, section 5); ce, z and weight are the sums of w_i * ce_i, w_i * z_i and w_i. A target whose weight is 0
    is ignored, whatever it is. The head (D, V), float32, is cast to the dtype of `hidden_BTD`; products accumulate in float32, and so does
    the head's gradient over chunks. `chunk_tokens` is per device. Must be traced inside `sharding.use_mesh`.
    """
    sums, _ = _over_chunks(hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens, with_gradients=False)
    return sums


def _forward(hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens):
    return _over_chunks(hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens, with_gradients=True)


def _backward(z_loss, chunk_tokens, gradients, cotangents):
    scale = cotangents[0]
    d_hidden_BTD, d_head_DV = gradients
    return (d_hidden_BTD * scale).astype(d_hidden_BTD.dtype), d_head_DV * scale, None, None


cross_entropy.defvjp(_forward, _backward)


def _over_chunks(hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens, with_gradients):
    """The four sums, and (d_hidden_BTD, d_head_DV) or None."""

    def local(hidden_BTD, head_DV, targets_BT, loss_weights_BT):
        B, T, D = hidden_BTD.shape
        size = min(chunk_tokens, B * T)
        padding = -(B * T) % size  # padded tokens have weight 0

        def chunked(array):
            flat = array.reshape(B * T, *array.shape[2:])
            return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(-1, size, *flat.shape[1:])

        def one_chunk(carry, chunk):
            sums, d_head_DV = carry
            hidden_CD, targets_C, weights_C = chunk
            logits_CV = jnp.einsum("CD,DV->CV", hidden_CD, head_DV, preferred_element_type=jnp.float32)
            lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
            is_target_CV = jnp.arange(logits_CV.shape[-1]) == targets_C[:, None]
            ce_C = lse_C - jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=-1)
            ce, z, weight = jnp.sum(weights_C * ce_C), jnp.sum(weights_C * lse_C**2), jnp.sum(weights_C)
            sums = tuple(total + part for total, part in zip(sums, (ce + z_loss * z, ce, z, weight), strict=True))
            if not with_gradients:
                return (sums, d_head_DV), None
            # d total / d logits = w * (softmax * (1 + 2 * z_loss * lse) - onehot)
            softmax_CV = jnp.exp(logits_CV - lse_C[:, None])
            d_logits_CV = softmax_CV * (weights_C * (1 + 2 * z_loss * lse_C))[:, None] - jnp.where(is_target_CV, weights_C[:, None], 0.0)
            d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
            d_hidden_CD = jnp.einsum("CV,DV->CD", d_logits_CV, head_DV)
            d_head_DV += jnp.einsum("CD,CV->DV", hidden_CD, d_logits_CV, preferred_element_type=jnp.float32)
            return (sums, d_head_DV), d_hidden_CD

        chunks = (chunked(hidden_BTD), chunked(targets_BT), chunked(loss_weights_BT))
        zero_sums = (jnp.float32(0),) * 4
        d_head_DV = jnp.zeros(head_DV.shape if with_gradients else (), jnp.float32)
        (sums, d_head_DV), d_hidden = jax.lax.scan(one_chunk, differs_by_shard((zero_sums, d_head_DV)), chunks)
        if not with_gradients:
            return sums
        return *sums, d_hidden.reshape(-1, D)[: B * T].reshape(B, T, D), d_head_DV

    outputs = ("sum",) * 4 + (("rows", "sum_embed") if with_gradients else ())
    run = on_each_batch_shard(local, split_args=(True, False, True, True), outputs=outputs)
    head_DV = nn.with_logical_constraint(head_DV.astype(hidden_BTD.dtype), ("embed", "vocab"))  # cast first, then gathered: half the bytes
    results = run(hidden_BTD, head_DV, targets_BT, loss_weights_BT)
    return results[:4], (results[4:] if with_gradients else None)
