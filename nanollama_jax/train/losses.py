"""Cross-entropy with z-loss over a large vocabulary, in chunks of tokens, so that the full
(tokens, vocabulary) logits never exist.

The gradients with respect to hidden states and head are computed in the forward pass, while a
chunk's logits are available; the backward pass only scales them. That takes three matrix products
per chunk, and none is computed twice.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama_jax.sharding import differs_by_shard, on_each_batch_shard


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss: float, chunk_tokens: int
):
    """Returns `(total, ce, z, weight)`, float32 scalars: sums over all tokens of all devices, not
    means. Only `total` has a gradient.

    total = sum_i w_i * (ce_i + z_loss * z_i), with ce_i = logsumexp(logits_i) - logits_i[target_i]
    and z_i = logsumexp(logits_i)^2 (the z-loss of PaLM, arXiv:2204.02311, section 5). ce, z and
    weight are the sums of w_i * ce_i, w_i * z_i and w_i. A target of weight 0 is ignored, whatever
    its value. The head (D, V), float32, is cast to the dtype of `hidden_BTD`; products accumulate
    in float32, as does the head's gradient over chunks. `chunk_tokens` is per device. Trace it
    inside `sharding.use_mesh`.
    """
    sums, _ = _over_chunks(
        hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens, with_gradients=False
    )
    return sums


def token_logprobs(hidden_BTD, head_DV, targets_BT, chunk_tokens: int):
    """(B, T) float32 natural-log probabilities of the targets, without a gradient, from the same
    matrix products as in `cross_entropy`."""

    def local(hidden_BTD, head_DV, targets_BT):
        B, T = targets_BT.shape
        size = min(chunk_tokens, B * T)

        def one_chunk(chunk):
            hidden_CD, targets_C = chunk
            logits_CV = jnp.einsum(
                "CD,DV->CV", hidden_CD, head_DV, preferred_element_type=jnp.float32
            )
            found_C1 = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)
            return found_C1[:, 0] - jax.nn.logsumexp(logits_CV, axis=-1)

        chunks = (_chunked(hidden_BTD, size), _chunked(targets_BT, size))
        return (jax.lax.map(one_chunk, chunks).reshape(-1)[: B * T].reshape(B, T),)

    hidden_BTD, head_DV = jax.lax.stop_gradient((hidden_BTD, head_DV))
    head_DV = nn.with_logical_constraint(head_DV.astype(hidden_BTD.dtype), ("embed", "vocab"))
    return on_each_batch_shard(local, split_args=(True, False, True), outputs=("rows",))(
        hidden_BTD, head_DV, targets_BT
    )[0]


def preference_loss(
    logprobs_BM,
    reference_BM,
    counts_BM,
    beta: float,
    label_smoothing: float,
    length_normalised: bool,
):
    """The DPO loss (Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing as in
    Mitchell's note on cDPO) of pairs in adjacent columns, chosen then rejected. Returns
    `(loss, d_logprobs_BM, sums)`: the sum over pairs, its derivative, and sums to log.

    `logprobs_BM` and `reference_BM` are the summed log-probabilities of each answer's tokens, and
    `counts_BM` their number (0: no such answer); `length_normalised` divides both by it. A reward
    is beta times the policy's gain over the reference, as in TRL.
    """
    exists_BP = (counts_BM[:, ::2] > 0).astype(jnp.float32)
    per_token = 1.0 / jnp.maximum(counts_BM, 1.0) if length_normalised else jnp.ones_like(counts_BM)

    def summed(logprobs_BM):
        rewards_BM = beta * per_token * (logprobs_BM - reference_BM)
        margin_BP = rewards_BM[:, ::2] - rewards_BM[:, 1::2]
        loss_BP = -(1 - label_smoothing) * jax.nn.log_sigmoid(
            margin_BP
        ) - label_smoothing * jax.nn.log_sigmoid(-margin_BP)
        return jnp.sum(exists_BP * loss_BP), (rewards_BM, margin_BP)

    (loss, (rewards_BM, margin_BP)), d_logprobs_BM = jax.value_and_grad(summed, has_aux=True)(
        logprobs_BM
    )
    over_pairs = lambda x_BP: jnp.sum(exists_BP * x_BP)  # noqa: E731
    sums = {
        "accuracy": over_pairs(margin_BP > 0),
        "margin": over_pairs(margin_BP),
        "reward_chosen": over_pairs(rewards_BM[:, ::2]),
        "reward_rejected": over_pairs(rewards_BM[:, 1::2]),
        "logprob_chosen": over_pairs(logprobs_BM[:, ::2]),
        "logprob_rejected": over_pairs(logprobs_BM[:, 1::2]),
        "weight": jnp.sum(exists_BP),
    }
    return loss, d_logprobs_BM, sums


def _forward(hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens):
    return _over_chunks(
        hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens, with_gradients=True
    )


def _backward(z_loss, chunk_tokens, gradients, cotangents):
    scale = cotangents[0]
    d_hidden_BTD, d_head_DV = gradients
    return (d_hidden_BTD * scale).astype(d_hidden_BTD.dtype), d_head_DV * scale, None, None


cross_entropy.defvjp(_forward, _backward)


def _chunked(array: jax.Array, size: int) -> jax.Array:
    """(B, T, ...) -> (chunks, size, ...), padded with zeros."""
    flat = array.reshape(-1, *array.shape[2:])
    padded = jnp.pad(flat, [(0, -len(flat) % size)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(-1, size, *flat.shape[1:])


def _over_chunks(
    hidden_BTD, head_DV, targets_BT, loss_weights_BT, z_loss, chunk_tokens, with_gradients
):
    """The four sums, and (d_hidden_BTD, d_head_DV) or None."""

    def local(hidden_BTD, head_DV, targets_BT, loss_weights_BT):
        B, T, D = hidden_BTD.shape
        size = min(chunk_tokens, B * T)

        def one_chunk(carry, chunk):
            sums, d_head_DV = carry
            hidden_CD, targets_C, weights_C = chunk
            logits_CV = jnp.einsum(
                "CD,DV->CV", hidden_CD, head_DV, preferred_element_type=jnp.float32
            )
            lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
            is_target_CV = jnp.arange(logits_CV.shape[-1]) == targets_C[:, None]
            ce_C = lse_C - jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=-1)
            ce, z, weight = (
                jnp.sum(weights_C * ce_C),
                jnp.sum(weights_C * lse_C**2),
                jnp.sum(weights_C),
            )
            sums = tuple(
                total + part
                for total, part in zip(sums, (ce + z_loss * z, ce, z, weight), strict=True)
            )
            if not with_gradients:
                return (sums, d_head_DV), None
            # d total / d logits = w * (softmax * (1 + 2 * z_loss * lse) - onehot)
            softmax_CV = jnp.exp(logits_CV - lse_C[:, None])
            d_logits_CV = softmax_CV * (weights_C * (1 + 2 * z_loss * lse_C))[:, None] - jnp.where(
                is_target_CV, weights_C[:, None], 0.0
            )
            d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
            d_hidden_CD = jnp.einsum("CV,DV->CD", d_logits_CV, head_DV)
            d_head_DV += jnp.einsum(
                "CD,CV->DV", hidden_CD, d_logits_CV, preferred_element_type=jnp.float32
            )
            return (sums, d_head_DV), d_hidden_CD

        # The padding of the last chunk has weight 0.
        chunks = tuple(_chunked(x, size) for x in (hidden_BTD, targets_BT, loss_weights_BT))
        zero_sums = (jnp.float32(0),) * 4
        d_head_DV = jnp.zeros(head_DV.shape if with_gradients else (), jnp.float32)
        (sums, d_head_DV), d_hidden = jax.lax.scan(
            one_chunk, differs_by_shard((zero_sums, d_head_DV)), chunks
        )
        if not with_gradients:
            return sums
        return *sums, d_hidden.reshape(-1, D)[: B * T].reshape(B, T, D), d_head_DV

    outputs = ("sum",) * 4 + (("rows", "sum_embed") if with_gradients else ())
    run = on_each_batch_shard(local, split_args=(True, False, True, True), outputs=outputs)
    # Cast before it is gathered: half the bytes
    head_DV = nn.with_logical_constraint(head_DV.astype(hidden_BTD.dtype), ("embed", "vocab"))
    results = run(hidden_BTD, head_DV, targets_BT, loss_weights_BT)
    return results[:4], (results[4:] if with_gradients else None)
