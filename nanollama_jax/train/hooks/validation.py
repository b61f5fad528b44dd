"""Measures the objective on held-out data of each source."""

import collections
from typing import Any

import jax
import numpy as np

from nanollama_jax import sharding
from nanollama_jax.data.pipeline import Batch
from nanollama_jax.train import metrics
from nanollama_jax.train.hooks.divergence import diverged
from nanollama_jax.train.hooks.run import Hook, Run
from nanollama_jax.train.objectives import means


class Validation(Hook):
    """Validates before the first step, every `every` steps, and after the last one."""

    def __init__(
        self, every: int, measure: Any, batches: dict[str, list[Batch]], shares: dict[str, float]
    ):
        """`measure` is `step.Program.measure`; `shares` are those of the training sources."""
        self.every, self._measure, self._batches = every, measure, batches
        self._shares = {name: share for name, share in shares.items() if name in batches}

    def start(self, run: Run) -> None:
        if run.step == 0 or (
            run.step == run.end_step
            and not metrics.validated_at(run.workdir / "metrics.jsonl", run.step)
        ):
            self.measure_all(run)

    def due(self, run: Run) -> bool:
        return not run.stop and super().due(run)

    def __call__(self, run: Run) -> None:
        self.measure_all(run)
        if run.validation_loss is None:
            run.stop = True

    def measure_all(self, run: Run) -> None:
        """Sets `run.validation_loss`, unless a signal cuts it short. The figures of "all" are means
        over the stage's training sources, weighted by their shares of the rows."""
        found = {}
        for name, batches in self._batches.items():
            found[name] = self._of_source(run, batches)
            if found[name] is None:
                return
        total = sum(self._shares.values())
        found["all"] = {
            key: sum(share * found[name][key] for name, share in self._shares.items()) / total
            for key in next(iter(found.values()))
        }
        run.watch.validation(found["all"])
        # A stage counts as finished once its last validation is on record: object before that.
        if run.step == run.end_step and (why := run.watch.objection(run.state)):
            diverged(run, why)
        run.reporter.validation(run.step, found)
        run.validation_loss = found["all"]["loss"]

    def _of_source(self, run: Run, batches: list[Batch]) -> dict[str, float] | None:
        theta = np.float32(run.rope_theta(run.step))
        total: collections.Counter[str] = collections.Counter()
        for batch in batches:
            if run.stop_requested(True):
                return None
            placed = sharding.put_batch(batch, run.mesh)
            sums = jax.device_get(self._measure(run.state.params, placed, theta))
            for name, value in sums.items():
                total[name] += float(value)
        return {name: float(value) for name, value in means(total).items()}
