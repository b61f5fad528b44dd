"""What a run does beyond training steps: each hook is a module with a class that is called with the
run when it is due.

`build` gives the hooks of a stage in the order in which they are called, which matters: validation
before checkpointing, so that the metrics of every validated checkpoint are on record; samples and
gates after it, so that what they stop is saved. A recipe adds a hook with `config.hooks.NAME`, the
keyword arguments of `make(run, **settings)` in nanollama_jax/train/hooks/NAME.py.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.data.pipeline import Batch
from nanollama_jax.errors import BadInput
from nanollama_jax.train.hooks.checkpointing import Checkpointing
from nanollama_jax.train.hooks.gates import Gates
from nanollama_jax.train.hooks.run import Hook, Run
from nanollama_jax.train.hooks.validation import Validation

__all__ = ["Hook", "Run", "build"]


def build(
    config: ConfigDict,
    run: Run,
    added: dict[str, dict[str, Any]],
    *,
    measure: Any,
    batches: dict[str, list[Batch]],
    metadata: dict[str, Any],
    position: Callable[[], dict[str, Any]],
    tokens_seen: int,
) -> list[Hook]:
    """The hooks of a stage. `added` maps those that not every stage has to their settings.

    `measure` is the jitted validation step, `batches` are the validation batches by source.
    `metadata` is common to all checkpoints, `position()` is where the data is now, `tokens_seen`
    counts the tokens up to the run's current step.
    """
    validation = Validation(config.validation.every, measure, batches, dict(config.data.sources))
    checkpointing = Checkpointing(
        config.checkpoint.every, metadata, position, tokens_seen, run.step, config.tokens_per_step
    )
    gates = Gates(config.gates.perplexity, config.gates.enforce, validation.measure_all)
    return [validation, checkpointing, *(make(name, run, added[name]) for name in added), gates]


def make(name: str, run: Run, settings: dict[str, Any]) -> Hook:
    """The hook of the module `name` in this folder. Raises BadInput if there is none."""
    module = f"{__name__}.{name}"
    if importlib.util.find_spec(module) is None:
        raise BadInput(f"hooks.{name}: there is no nanollama_jax/train/hooks/{name}.py")
    return importlib.import_module(module).make(run, **settings)


def milestones(
    start_step: int, end_step: int, gates: Sequence[tuple[int, float, float]]
) -> frozenset[int]:
    """The steps at which a stage is always validated and saved: its last one, and its gates. A gate
    at `start_step` belongs to the stage before."""
    return frozenset([end_step, *(step for step, *_ in gates if step > start_step)])
