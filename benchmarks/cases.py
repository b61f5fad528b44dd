"""Cases, each measured in its own process.

Neither what a case leaves in a GPU's memory nor its crash affects the next one.
"""

import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
GRACE = 25.0  # seconds beyond the budget for a case that started within it
LONGEST = 240.0  # seconds for any case: one that hangs leaves time for the others
OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Case:
    """`measure(**arguments)` returns what to add to the row.

    `attempts` are arguments, tried in order until one does not run out of memory.
    """

    name: str
    measure: Callable[..., Row]
    attempts: tuple[Row, ...]


def run_cases(cases: list[Case], minutes: float) -> Iterator[Row]:
    """Yields a row per case once it is measured: what `measure` returned, or a one-line `error`.

    A case that returns a `table` yields its rows. No case starts after `minutes`.
    """
    ends = time.monotonic() + 60 * minutes
    for case in cases:
        row = {"error": "skipped: --minutes was used up"}
        for arguments in case.attempts:
            if (left := ends - time.monotonic()) <= 0:
                break
            row = arguments | in_process(case.measure, min(left + GRACE, LONGEST), **arguments)
            if row.get("error") != OUT_OF_MEMORY:
                break
        yield from row.get("table") or [{"case": case.name} | row]


def in_process(measure: Callable[..., Row], limit: float, /, **arguments: Any) -> Row:
    """What `measure(**arguments)` returns in a new process, or `error` (and its traceback).

    An error is an exception, a killed process, or no result after `limit` seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            process.kill()
            return {"error": f"stopped after {limit:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.join(10)
        process.kill()
        process.join()


def _send(sender, measure: Callable[..., Row], arguments: Row) -> None:
    try:
        result = measure(**arguments)
    except Exception as error:  # a failed case is a row like any other
        traceback.print_exc()
        result = {"error": one_line(error), "traceback": traceback.format_exc()[-4000:]}
    sender.send(result)
    sender.close()


def one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() or "OutOfMemory" in text:
        return OUT_OF_MEMORY
    return " ".join(text.split())[:200]
