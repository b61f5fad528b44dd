"""The state of a stage, as hooks see it, and what a hook is."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from nanollama_jax.checkpoint import Checkpoints
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.metrics import Reporter
from nanollama_jax.train.step import TrainState

if TYPE_CHECKING:  # it imports Run
    from nanollama_jax.train.hooks.divergence import Watch


@dataclasses.dataclass
class Run:
    """A stage under way. The loop advances `step` and `state`; a hook may set `stop`."""

    name: str  # of the stage
    workdir: pathlib.Path
    start_step: int
    end_step: int
    milestones: frozenset[int]  # steps at which a run is always validated and saved
    peak_lr: float
    origin: pathlib.Path | None  # the checkpoint that it started from
    model: ModelConfig
    tokenizer: Tokenizer
    context_length: int  # tokens
    mesh: jax.sharding.Mesh
    rope_theta: Callable[[int], Any]  # of the global step
    checkpoints: Checkpoints
    watch: "Watch"
    state: TrainState
    step: int
    reporter: Reporter | None = None  # set before the first step
    stop_requested: Callable[[bool], bool] = lambda ask_others: False  # see signals.py
    stop: bool = False  # save, and end after this step
    validation_loss: float | None = None  # at this step, over the stage's mix; None: not validated

    def advance(self, state: TrainState) -> None:
        """Takes the state after one more step."""
        self.state, self.step, self.validation_loss = state, self.step + 1, None


class Hook:
    """Called every `every` steps, and at the stage's milestones: its last step and its gates."""

    every: int

    def start(self, run: Run) -> None:
        """Called once, before the first step."""

    def due(self, run: Run) -> bool:
        """Whether to call it at this step. Hooks before it in order have been called."""
        return run.step % self.every == 0 or run.step in run.milestones

    def __call__(self, run: Run) -> None:
        raise NotImplementedError
