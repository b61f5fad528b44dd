"""Training objectives. They return sums and counts, never means: the step takes the global mean
once, over devices and micro-batches.
"""

import jax
import jax.numpy as jnp

from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.model.attention import merged_documents
from nanollama_jax.train.losses import cross_entropy, preference_loss, token_logprobs

# float32 scalars. Those not in COUNTS are logged divided by `weight`.
Sums = dict[str, jax.Array]
COUNTS = ("weight", "learnt_tokens", "merged_in_attention")


def means(sums: Sums) -> dict[str, jax.Array]:
    """The means to log, from an objective's sums over a whole batch."""
    weight = jnp.maximum(sums["weight"], 1.0)
    return {name: total / weight for name, total in sums.items() if name not in COUNTS}


def next_token(
    params,
    batch: dict[str, jax.Array],
    rope_theta: jax.Array,
    model: ModelConfig,
    z_loss: float,
    chunk_tokens: int,
) -> tuple[jax.Array, Sums]:
    """The summed loss to differentiate, and its parts: `loss` (cross-entropy), `z`, and `weight`,
    the number of learned tokens; also `merged_in_attention`, the documents that attention merged
    into their predecessor. `batch` is described in data/pipeline.py."""
    hidden_BTD = Llama(model).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"], rope_theta
    )
    head_DV = params["head"]["kernel"]
    total, ce, z, weight = cross_entropy(
        hidden_BTD, head_DV, batch["targets"], batch["loss_weights"], z_loss, chunk_tokens
    )
    merged = merged_documents(batch["segment_ids"], model)
    return total, {
        "loss": ce,
        "z": z,
        "weight": weight,
        "learnt_tokens": weight,
        "merged_in_attention": merged,
    }


def preference(
    params,
    batch: dict[str, jax.Array],
    rope_theta: jax.Array,
    model: ModelConfig,
    chunk_tokens: int,
    beta: float,
    label_smoothing: float,
    length_normalised: bool,
) -> tuple[jax.Array, Sums]:
    """DPO on packed pairs (data/rows.py); `weight` is their number. The batch has the reference's
    log-probabilities, `reference_logprobs` (B, M) float32.

    The loss has the gradient of a cross-entropy in which each token of an answer is weighted by the
    loss's derivative with respect to the answer's log-probability. That cross-entropy is what is
    returned to differentiate; its value has no meaning.
    """
    hidden_BTD = Llama(model).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"], rope_theta
    )
    head_DV, reference_BM = params["head"]["kernel"], batch["reference_logprobs"]
    logprobs_BM, counts_BM = answer_logprobs(
        hidden_BTD, head_DV, batch, reference_BM.shape[1], chunk_tokens
    )
    loss, d_logprobs_BM, sums = preference_loss(
        logprobs_BM, reference_BM, counts_BM, beta, label_smoothing, length_normalised
    )
    of_token_BTM = batch["segment_ids"][:, :, None] == jnp.arange(1, reference_BM.shape[1] + 1)
    token_weights_BT = (
        -jnp.sum(of_token_BTM * d_logprobs_BM[:, None, :], axis=-1) * batch["loss_weights"]
    )
    total, *_ = cross_entropy(
        hidden_BTD, head_DV, batch["targets"], token_weights_BT, 0.0, chunk_tokens
    )
    sums |= {
        "loss": loss,
        "learnt_tokens": jnp.sum(batch["loss_weights"]),
        "merged_in_attention": merged_documents(batch["segment_ids"], model),
    }
    # Per token of an answer: estimates KL(reference || policy) if answers are like the reference's
    kl_BM = (reference_BM - logprobs_BM) * (counts_BM > 0) / jnp.maximum(counts_BM, 1.0)
    sums["kl"] = jnp.sum(kl_BM) / 2
    return total, sums


def answer_logprobs(
    hidden_BTD, head_DV, batch: dict[str, jax.Array], segments: int, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The summed log-probability of each segment's learned targets, and their number; (B, M)
    float32, without a gradient."""
    logprobs_BT = (
        token_logprobs(hidden_BTD, head_DV, batch["targets"], chunk_tokens) * batch["loss_weights"]
    )
    of_token_BTM = batch["segment_ids"][:, :, None] == jnp.arange(1, segments + 1)
    counts_BTM = batch["loss_weights"][:, :, None] * of_token_BTM
    return _pairwise_sum(logprobs_BT[:, :, None] * of_token_BTM), _pairwise_sum(counts_BTM)


def _pairwise_sum(x_BTM):
    """Sums over T, in float32 and right to the last bit. DPO learns from small differences of sums;
    a matrix product loses several bits (a sum of 600 tokens, -8,873, was off by 7e-3)."""
    T = x_BTM.shape[1]
    x_BTM = jnp.pad(x_BTM, [(0, 0), (0, (1 << (T - 1).bit_length()) - T), (0, 0)])
    while half := x_BTM.shape[1] // 2:
        x_BTM = x_BTM[:, :half] + x_BTM[:, half:]
    return x_BTM[:, 0]
