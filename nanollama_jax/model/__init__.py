"""The Llama architecture in Flax linen.

Shapes live in names. The dimension letters, used here and in every einsum of the project:

    B  batch (rows)        D  model width          L  layers
    T  tokens (queries)    N  query heads          V  vocabulary
    S  tokens (keys)       K  key/value heads      C  tokens of one loss chunk
    H  head dimension      G  query heads per key/value head (N = K * G)
    F  FFN width           M  documents in a row

Parameters carry logical axis names (`embed`, `heads`, `kv_heads`, `head_dim`, `ffn`, `vocab`,
`layers`, `norm`); `nanollama_jax/sharding.py` maps them to mesh axes.
"""

from nanollama_jax.model.config import ModelConfig
from nanollama_jax.model.llama import Llama

__all__ = ["Llama", "ModelConfig"]
