"""nanollama-jax: a Llama-architecture language model, from raw text to a trained checkpoint, in JAX. The README maps the rooms."""
