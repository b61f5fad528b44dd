"""Whether a run is fit to be saved. A state that is not finite, or a model that has lost most of what it had learned, never replaces a good
checkpoint and never finishes a stage; a run that does not recover stops, and says which checkpoint to resume from.
"""

import collections
import functools
import math
import pathlib
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from nanollama_jax.checkpoint import Checkpoints
from nanollama_jax.errors import RunStopped
from nanollama_jax.train.metrics import log

MAX_SKIPPED_IN_A_ROW = 10
MAX_NOT_SAVED_IN_A_ROW = 3  # times that a checkpoint is due
WINDOW = 10  # steps
LEARNED = 1.0  # nats a token below chance: less is too little to tell a loss of it from noise


@jax.jit
def is_finite(state: Any) -> jax.Array:
    """Of a TrainState: whether the norm of the parameters (a weight of 1e20 has none in float32) and all of the optimizer's state are finite."""
    moments = [jnp.isfinite(x).all() for x in jax.tree.leaves(state.opt_state)]
    return functools.reduce(jnp.logical_and, moments, jnp.isfinite(optax.tree.norm(state.params)))


class Watch:
    """Follows the loss of a stage in nats a token. (Of DPO, whose loss is of pairs, it is `kl`: by how much answers became less likely.)

    Chance, ln(vocab), is what a network gives that has died. Diverged means that the mean of the last steps, or a validation, is back above the
    middle between chance and the lowest before. `lowest` is kept in checkpoints: a resumed run is compared with what it was.
    """

    def __init__(self, task: str, vocab_size: int, lowest: dict[str, float]):
        self._measure, self._chance = "kl" if task == "dpo" else "loss", math.log(vocab_size)
        self.lowest = dict(lowest)  # "training", "validation" -> nats a token
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._diverged: dict[str, str] = {}
        self.good_steps = self.skipped_in_a_row = self.not_saved_in_a_row = 0

    def step(self, step: int, values: dict[str, float]) -> None:
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
                f"the model has diverged: {kind} {self._measure} {value:.4g} nats a token, after {lowest:.2f}"
            )
        self.lowest[kind] = lowest

    def objection(self, state: Any) -> str | None:
        """Why this state must not be saved now, or None."""
        if self.skipped_in_a_row:
            return f"the last {self.skipped_in_a_row} update(s) were skipped: loss, gradient or optimizer state was not finite"
        if self._diverged:
            return next(iter(self._diverged.values()))
        return None if is_finite(state) else "parameters or optimizer state are not finite"


def stop(
    why: str, checkpoints: Checkpoints, peak_lr: float, suspect: pathlib.Path | None
) -> NoReturn:
    """Raises RunStopped with what to do. `suspect` is the checkpoint that a run resumed from that has not made one good step since."""
    checkpoints.wait()
    if suspect is not None:
        others = [step for step in saved_steps(suspect.parent) if suspect.name != f"step_{step}"]
        then = f"remove it (rm -r {suspect}) and rerun: training resumes from step {others[-1]}"
        if not others:
            then = f"it is the only one in {suspect.parent}: start again with another --workdir"
        raise RunStopped(
            f"{why}, and no step since {suspect} was good: that checkpoint is damaged or had diverged already: {then}"
        )
    lower = f"lower optimizer.peak_lr (now {peak_lr:g}), or look at the data,"
    if not (steps := saved_steps(checkpoints.directory)):
        raise RunStopped(f"{why}. Nothing was saved yet: {lower} and rerun from the start")
    folder = checkpoints.directory / f"step_{steps[-1]}"
    earlier = (
        f"; if it stops again, remove that folder to resume from step {steps[-2]}"
        if len(steps) > 1
        else ""
    )
    raise RunStopped(
        f"{why}. The last good checkpoint is {folder}: {lower} and rerun to resume from it{earlier}"
    )


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Of the whole checkpoints in a folder, ascending."""
    names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal())
