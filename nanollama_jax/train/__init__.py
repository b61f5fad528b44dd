"""From batches to weights: losses, optimizer, step, loop, metrics, gates."""
