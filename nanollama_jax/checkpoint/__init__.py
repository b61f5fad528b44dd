"""Checkpoints: what one is (store.py), and where a run starts from (origin.py)."""

from nanollama_jax.checkpoint.store import (
    FOLDER,
    TASKS,
    Checkpoints,
    Loaded,
    find,
    is_checkpoint,
    load,
    read_metadata,
    reported_saved,
    save_weights,
    weights_metadata,
)

__all__ = [
    "FOLDER",
    "TASKS",
    "Checkpoints",
    "Loaded",
    "find",
    "is_checkpoint",
    "load",
    "read_metadata",
    "reported_saved",
    "save_weights",
    "weights_metadata",
]
