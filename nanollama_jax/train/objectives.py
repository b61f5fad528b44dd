"""What is minimised. An objective returns sums and counts, never means: the step takes the global mean once, over devices and micro-batches."""

import jax
import jax.numpy as jnp

from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.model.attention import merged_documents
from nanollama_jax.train.losses import cross_entropy


def next_token(
    params, batch: dict[str, jax.Array], rope_theta: jax.Array, model: ModelConfig, z_loss: float, chunk_tokens: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss to differentiate, and the sums behind it, scalars: `ce`, `z` and `weight` (float32), and `merged`, documents that attention
    could not keep apart. `batch` is as in data/pipeline.py."""
    hidden_BTD = Llama(model).apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"], rope_theta)
    total, ce, z, weight = cross_entropy(
        hidden_BTD, params["head"]["kernel"], batch["targets"], batch["loss_weights"].astype(jnp.float32), z_loss, chunk_tokens
    )
    return total, {"ce": ce, "z": z, "weight": weight, "merged": merged_documents(batch["segment_ids"], model)}
