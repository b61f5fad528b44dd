"""How long a call takes on a device: the median over rounds, after warm-up, with its spread."""

import statistics
import time
from collections.abc import Callable
from typing import Any

SHORTEST_ROUND = 0.05  # seconds: in shorter rounds the clock and the dispatch would show


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """The median, and half the range as a fraction of it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / 2 / median


def seconds_per_call(
    call: Callable[[], Any], wait: Callable[[Any], Any], rounds: int = 5
) -> tuple[float, float]:
    """Median seconds of `call`, and the spread, over rounds of at least SHORTEST_ROUND.

    `wait` blocks until a result is ready.
    """
    wait(call())
    started = time.perf_counter()
    wait(call())
    calls = max(1, int(SHORTEST_ROUND / (time.perf_counter() - started)))
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        found.append((time.perf_counter() - started) / calls)
    return median_and_spread(found)
