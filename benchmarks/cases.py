"""Cases, each measured in a process of its own: neither what one leaves in a GPU's memory, nor its end, if it runs out, touches the next."""

import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
GRACE = 25.0  # seconds beyond the budget that a case which began within it may take
LONGEST = 240.0  # seconds that any case may take: one that hangs leaves time for the others
OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Case:
    """`measure(**arguments)` gives what to add to the row; `attempts` are tried in order until one does not run out of memory."""

    name: str
    measure: Callable[..., Row]
    attempts: tuple[Row, ...]


def run_cases(cases: list[Case], minutes: float) -> Iterator[Row]:
    """A row a case, as it is measured: what `measure` gave (of a `table`, its rows), or `error`, one line. None is begun after `minutes`."""
    ends = time.monotonic() + 60 * minutes
    for case in cases:
        row = {"error": "left out: --minutes was used up"}
        for arguments in case.attempts:
            if (left := ends - time.monotonic()) <= 0:
                break
            row = arguments | in_process(case.measure, min(left + GRACE, LONGEST), **arguments)
            if row.get("error") != OUT_OF_MEMORY:
                break
        yield from row.get("table") or [{"case": case.name} | row]


def in_process(measure: Callable[..., Row], limit: float, /, **arguments: Any) -> Row:
    """What `measure(**arguments)` gives in a new process, or `error` and its traceback: raised, killed, or not there after `limit` seconds."""
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
    except Exception as error:  # a failed case is a row like any other, and the next goes on
        traceback.print_exc()
        result = {"error": one_line(error), "traceback": traceback.format_exc()[-4000:]}
    sender.send(result)
    sender.close()


def one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() or "OutOfMemory" in text:
        return OUT_OF_MEMORY
    return " ".join(text.split())[:200]
