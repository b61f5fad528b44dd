"""Watches the loss. A state that is not finite, or a model that has lost most of what it had
learned, never replaces a good checkpoint and never finishes a stage. A run that does not recover
stops, and names the checkpoint to resume from.
"""

import collections
import functools
import math
import pathlib
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from nanollama_jax.errors import RunStopped
from nanollama_jax.train.hooks.run import Run
from nanollama_jax.train.metrics import log

MAX_SKIPPED_IN_A_ROW = 10
MAX_NOT_SAVED_IN_A_ROW = 3  # times that a checkpoint is due
WINDOW = 10  # steps
LEARNED = 1.0  # nats per token below chance: with less, noise looks like a loss of it


@jax.jit
def is_finite(state: Any) -> jax.Array:
    """Whether all of a TrainState's optimizer state and the norm of its parameters are finite. (A
    weight of 1e20 has no norm in float32.)"""
    moments = [jnp.isfinite(x).all() for x in jax.tree.leaves(state.opt_state)]
    return functools.reduce(jnp.logical_and, moments, jnp.isfinite(optax.tree.norm(state.params)))


class Watch:
    """Follows a stage's training and validation loss, `measure`, in nats per token.

    The loss of a dead network is chance, ln(vocab_size). A run has diverged if the mean of its last
    steps, or a validation, is above the midpoint between chance and the lowest value so far.
    `lowest` is kept in checkpoints, so that a resumed run is compared with its past.
    """

    def __init__(self, measure: str, vocab_size: int, lowest: dict[str, float]):
        self._measure, self._chance = measure, math.log(vocab_size)
        self.lowest = dict(lowest)  # "training", "validation" -> nats per token
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._diverged: dict[str, str] = {}
        self.good_steps = self.skipped_in_a_row = 0

    def step(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of a training step."""
        if values["update_skipped"]:
            self.skipped_in_a_row += 1
            log.warning(
                "step %d: loss, gradient or optimizer state is not finite; its update was skipped",
                step,
            )
            return
        self.skipped_in_a_row = 0
        self._recent.append(values[self._measure])
        self._compare("training", sum(self._recent) / len(self._recent))
        self.good_steps += "training" not in self._diverged

    def validation(self, means: dict[str, float]) -> None:
        """Takes a validation's means."""
        self._compare("validation", means[self._measure])

    def _compare(self, kind: str, value: float) -> None:
        lowest = min(value, self.lowest.get(kind, math.inf))
        limit = (lowest + self._chance) / 2
        self._diverged.pop(kind, None)
        if not math.isfinite(value):
            self._diverged[kind] = f"the {kind} loss is {value}"
            return
        if lowest < self._chance - LEARNED and value > limit:
            self._diverged[kind] = (
                f"the model has diverged: {kind} {self._measure} {value:.4g} nats per token, "
                f"after {lowest:.2f}"
            )
        self.lowest[kind] = lowest

    def objection(self, state: Any) -> str | None:
        """Why this state must not be saved now, or None."""
        if self.skipped_in_a_row:
            return (
                f"the last {self.skipped_in_a_row} update(s) were skipped: loss, gradient or "
                "optimizer state was not finite"
            )
        if self._diverged:
            return next(iter(self._diverged.values()))
        return None if is_finite(state) else "parameters or optimizer state are not finite"

    def start(self, run: Run) -> None:
        """Called before the first step: stops a run whose state is not finite."""
        if not is_finite(run.state):
            diverged(run, "parameters or optimizer state are not finite")

    def __call__(self, run: Run) -> None:
        """Called after every step: stops a run whose updates are all skipped."""
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            diverged(run, self.objection(run.state))


def diverged(run: Run, why: str) -> NoReturn:
    """Raises RunStopped with what to do. If the run has made no good step since the checkpoint that
    it started from, that one is the suspect."""
    why = f"{run.name}, step {run.step}: {why}"
    run.checkpoints.wait()
    if run.origin and not run.watch.good_steps:
        raise RunStopped(_suspect(why, run.origin))
    directory = run.checkpoints.directory
    lower = f"lower optimizer.peak_lr (now {run.peak_lr:g}), or look at the data,"
    if not (steps := saved_steps(directory)):
        raise RunStopped(f"{why}. Nothing was saved yet: {lower} and rerun from the start")
    earlier = ""
    if len(steps) > 1:
        earlier = f"; if it stops again, remove that folder to resume from step {steps[-2]}"
    raise RunStopped(
        f"{why}. The last good checkpoint is {directory / f'step_{steps[-1]}'}: {lower} and rerun "
        f"to resume from it{earlier}"
    )


def _suspect(why: str, checkpoint: pathlib.Path) -> str:
    others = [step for step in saved_steps(checkpoint.parent) if checkpoint.name != f"step_{step}"]
    if others:
        then = f"remove it (rm -r {checkpoint}) and rerun: training resumes from step {others[-1]}"
    else:
        then = f"it is the only one in {checkpoint.parent}: start again with another --workdir"
    return (
        f"{why}, and no step since {checkpoint} was good: that checkpoint is damaged or had "
        f"already diverged: {then}"
    )


def saved_steps(folder: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal())
