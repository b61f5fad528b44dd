"""Saves the run, unless what it would save has diverged."""

from collections.abc import Callable
from typing import Any

from nanollama_jax.train.hooks.divergence import MAX_NOT_SAVED_IN_A_ROW, diverged
from nanollama_jax.train.hooks.run import Hook, Run
from nanollama_jax.train.metrics import log


class Checkpointing(Hook):
    """Saves every `every` steps, and when the run is asked to stop."""

    def __init__(
        self,
        every: int,
        metadata: dict[str, Any],
        position: Callable[[], dict[str, Any]],
        tokens_before: int,
        first_step: int,
        tokens_per_step: int,
    ):
        """`metadata` is what all checkpoints of the run have in common; `position()` is where the
        data stands. `tokens_before` were seen up to `first_step`, the one the run starts from."""
        self.every, self._metadata, self._position = every, metadata, position
        self._tokens_before, self._first_step = tokens_before, first_step
        self._tokens_per_step = tokens_per_step
        self._not_saved_in_a_row = 0

    def due(self, run: Run) -> bool:
        return run.stop or super().due(run)

    def __call__(self, run: Run) -> None:
        if why := run.watch.objection(run.state):
            self._not_saved_in_a_row += 1
            too_many = self._not_saved_in_a_row >= MAX_NOT_SAVED_IN_A_ROW
            if run.step in run.milestones or too_many:
                diverged(run, why)
            log.warning("%s: not saved at step %d: %s", run.name, run.step, why)
            return
        self._not_saved_in_a_row = 0
        seen = self._tokens_before + (run.step - self._first_step) * self._tokens_per_step
        metadata = self._metadata | {
            "step": run.step,
            "rope_theta": float(run.rope_theta(run.step)),
            "lowest_loss": run.watch.lowest,
            "tokens_seen": seen,
        }
        run.checkpoints.save(
            run.step,
            run.state,
            self._position(),
            metadata,
            run.tokenizer.model_bytes,
            run.validation_loss,
        )


def report_end(run: Run) -> None:
    """Waits for the last checkpoint, and logs how the run ended."""
    run.checkpoints.wait()
    saved = run.checkpoints.latest_step()
    if not run.stop:
        folder = run.checkpoints.directory / f"step_{saved}"
        log.info("%s: finished at step %d and saved in %s", run.name, saved, folder)
        return
    kept = "nothing saved yet" if saved is None else f"nothing saved since step {saved}"
    log.warning(
        "%s: stopped by a signal at step %d (%s); rerun the command to resume",
        run.name,
        run.step,
        "saved" if saved == run.step else kept,
    )
