"""A model with random weights for any tokenizer, for tests in which weights do not matter."""

import jax
import numpy as np

from nanollama_jax import checkpoint
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import param_shapes
from nanollama_jax.tokenizer import Tokenizer


def tiny(tokenizer: Tokenizer) -> checkpoint.Loaded:
    """One layer of width 32."""
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        ffn_dim=64,
        norm_eps=1e-5,
        scan_layers=False,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(model)
    )
    about = checkpoint.weights_metadata(model, tokenizer, 10_000.0, 128, {"imported_from": "tiny"})
    return checkpoint.Loaded(model, params, tokenizer, about, "tiny")
