"""From text to batches. Nothing here imports jax: preparation and reading run in workers that must not open the GPU."""
