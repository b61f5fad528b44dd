"""Go/no-go gates as code: at given global steps a measure decides whether a run goes on, goes on with a warning, or stops.

What was decided is kept in `WORKDIR/gates.json`, so that a stopped run that is started again stops again, until it is told not to.
"""

import json
import pathlib
from collections.abc import Sequence

from nanollama_jax.files import write_json


def verdict(perplexity: float, go: float, stop: float) -> str:
    """ "go" below `go`, "stop" above `stop` (or for NaN), "caution" between."""
    if perplexity < go:
        return "go"
    return "caution" if perplexity <= stop else "stop"


def thresholds(gates: Sequence[tuple[int, float, float]], step: int) -> tuple[float, float] | None:
    """(go, stop) of the gate at a step, or None where there is none."""
    return next(((go, stop) for at, go, stop in gates if at == step), None)


def passed(workdir: pathlib.Path, step: int) -> bool:
    """Whether the gate at a step has let this workdir's run go on."""
    return read(workdir).get(str(step)) in ("go", "caution", "overridden")


def read(workdir: pathlib.Path) -> dict[str, str]:
    """Step (as text) -> verdict, of the gates that this workdir has met."""
    path = workdir / "gates.json"
    return json.loads(path.read_text()) if path.exists() else {}


def record(workdir: pathlib.Path, step: int, decided: str) -> None:
    write_json(workdir / "gates.json", read(workdir) | {str(step): decided})
