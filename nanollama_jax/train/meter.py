"""Times the steps of a run, and passes their metrics on one step late."""

import contextlib
import time
from collections.abc import Iterator

import jax

from nanollama_jax.train.hooks.divergence import Watch
from nanollama_jax.train.metrics import Reporter, log

# A count of documents that attention sees as one -> the setting to raise
REMEDIES = {
    "merged_documents": "data.max_segments",
    "merged_in_attention": "model.packed_documents",
}


class Meter:
    """Fetches each step's metrics after the next step is dispatched, so that the device never waits
    for the host."""

    def __init__(self, reporter: Reporter, watch: Watch):
        self._reporter, self._watch = reporter, watch
        self._pending: tuple[int, dict[str, jax.Array], dict[str, int], float] | None = None
        self._data_seconds = 0.0
        self._warned: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Restarts the clock: hooks do not count as part of a step."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measures how long the block waits for a batch."""
        started = time.monotonic()
        yield
        self._data_seconds = time.monotonic() - started

    def take(self, step: int, step_metrics: dict[str, jax.Array], of_batch: dict[str, int]) -> None:
        """Takes the metrics of a step that was dispatched, and reports those of the one before."""
        pending, self._pending = self._pending, (step, step_metrics, of_batch, self._data_seconds)
        self._report(pending)

    def flush(self) -> None:
        """Waits for the last step, and reports it."""
        pending, self._pending = self._pending, None
        self._report(pending)

    def _report(self, pending) -> None:
        if pending is None:
            return
        step, step_metrics, of_batch, data_seconds = pending
        fetched = jax.device_get(step_metrics)  # waits for the device
        values = {name: float(value) for name, value in fetched.items()} | of_batch
        now = time.monotonic()
        self._reporter.step(step, values, seconds=now - self._last, data_seconds=data_seconds)
        self._last = now
        for name, setting in REMEDIES.items():
            if values[name] and name not in self._warned:
                log.warning(
                    "step %d: %d documents are attended together with the one before: raise %s",
                    step,
                    values[name],
                    setting,
                )
                self._warned.add(name)
        self._watch.step(step, values)
