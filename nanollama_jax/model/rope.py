"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

In Hugging Face's rotate-half layout, so exports need no permutation.
"""

import jax
import jax.numpy as jnp


def rope_table(
    positions_BT: jax.Array, head_dim: int, rope_theta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each (B, T, H/2) float32, of integer positions. `rope_theta` may be traced."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inverse_frequency = 1.0 / (rope_theta**exponent)
    angle = positions_BT[..., None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + H/2) of each head in float32; returns the dtype of `x_BTNH`."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
