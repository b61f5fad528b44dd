"""What a checkpoint is, and where a run starts from.

metadata.py: the record that it holds; folders.py: where it lies; integrity.py: whether it is what
was written; store.py: saving and restoring; loading.py: opening one for use; origin.py: the
checkpoint that a run starts from.
"""

from nanollama_jax.checkpoint.folders import FOLDER, find, is_checkpoint, reported_saved
from nanollama_jax.checkpoint.loading import Loaded, load, read_metadata
from nanollama_jax.checkpoint.metadata import TASKS, Metadata, provenance, weights_metadata
from nanollama_jax.checkpoint.store import Checkpoints, save_weights

__all__ = [
    "FOLDER",
    "TASKS",
    "Checkpoints",
    "Loaded",
    "Metadata",
    "find",
    "is_checkpoint",
    "load",
    "provenance",
    "read_metadata",
    "reported_saved",
    "save_weights",
    "weights_metadata",
]
