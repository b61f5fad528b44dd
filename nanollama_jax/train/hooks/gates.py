"""Go/no-go gates: at given global steps the validation perplexity decides whether a run continues,
continues with a warning, or stops.

Verdicts are kept in `WORKDIR/gates.json`. A stopped run stops again when it is restarted, unless
its gates are no longer enforced.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from nanollama_jax.errors import RunStopped
from nanollama_jax.files import write_json
from nanollama_jax.train.hooks.run import Hook, Run
from nanollama_jax.train.metrics import log

FILE = "gates.json"
LEVELS = {"go": logging.INFO, "caution": logging.WARNING, "stop": logging.ERROR}


class Gates(Hook):
    """Due wherever the run was validated at a gate. A gate at the step where a stage starts belongs
    to the stage before it."""

    def __init__(
        self,
        gates: Sequence[tuple[int, float, float]],
        enforce: bool,
        validate: Callable[[Run], None],
    ):
        """`gates` are (step, go, stop); `validate(run)` sets `run.validation_loss`."""
        self._gates, self._enforce, self._validate = gates, enforce, validate

    def start(self, run: Run) -> None:
        """Meets a gate that held the run before."""
        if run.step > run.start_step and thresholds(self._gates, run.step):
            self(run)

    def due(self, run: Run) -> bool:
        return run.validation_loss is not None and bool(thresholds(self._gates, run.step))

    def __call__(self, run: Run) -> None:
        if passed(run.workdir, run.step):
            return
        if run.validation_loss is None:
            self._validate(run)
        if run.validation_loss is None:
            return
        go, stop = thresholds(self._gates, run.step)
        perplexity = float(np.exp(run.validation_loss))
        decided = verdict(perplexity, go, stop)
        enforced = decided == "stop" and self._enforce
        if jax.process_index() == 0:
            overridden = decided == "stop" and not enforced
            record(run.workdir, run.step, "overridden" if overridden else decided)
        text = (
            f"gate at step {run.step}: validation perplexity {perplexity:.2f} (go below {go:g}, "
            f"stop above {stop:g}): {decided}"
        )
        log.log(LEVELS[decided], "%s", text)
        if enforced:
            run.checkpoints.wait()
            raise RunStopped(
                f"{text}. The run is saved; to continue anyway, rerun with "
                "--config.gates.enforce=False"
            )


def verdict(perplexity: float, go: float, stop: float) -> str:
    """ "go" below `go`, "stop" above `stop` (or for NaN), "caution" between."""
    if perplexity < go:
        return "go"
    return "caution" if perplexity <= stop else "stop"


def thresholds(gates: Sequence[tuple[int, float, float]], step: int) -> tuple[float, float] | None:
    """(go, stop) of the gate at a step, or None if there is none."""
    return next(((go, stop) for at, go, stop in gates if at == step), None)


def passed(workdir: pathlib.Path, step: int) -> bool:
    """Whether the gate at a step has let the run in a workdir continue."""
    return read(workdir).get(str(step)) in ("go", "caution", "overridden")


def read(workdir: pathlib.Path) -> dict[str, str]:
    """Step (as text) -> verdict of the gates that a workdir has met."""
    path = workdir / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def record(workdir: pathlib.Path, step: int, decided: str) -> None:
    """Adds a verdict to a workdir's file."""
    write_json(workdir / FILE, read(workdir) | {str(step): decided})
