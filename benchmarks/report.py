"""What a benchmark prints and writes.

The machine, each row once it is measured, and finally the whole table; and the same as JSON.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

from nanollama_jax.files import write_json

Row = dict[str, Any]
Columns = dict[str, tuple[str, str]]  # key of a row -> heading, format

_ASKED = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)
_VERSIONS = (
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "transformers",
    "triton",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU that jax may use.

    Asks the driver: asking jax would reserve most of the GPU's memory.
    """
    return os.environ.get("JAX_PLATFORMS", "cuda") != "cpu" and bool(_nvidia_smi("-L"))


def environment() -> Row:
    """The machine, its GPUs as they are now, and the versions of what is measured."""
    found = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = _nvidia_smi(f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader").splitlines()
    return found | {f"gpu{i}": dict(zip(_ASKED, line.split(", "))) for i, line in enumerate(lines)}


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def collect(
    rows: Iterable[Row],
    columns: Columns,
    title: str,
    json_path: str | None,
    notes: Callable[[list[Row]], list[str]],
) -> list[Row]:
    """Prints the machine, each row as it comes, the table and the lines of `notes(rows)`.

    The file at `json_path` is kept up to date after every row.
    """
    about, found = environment(), []
    for key, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {of}" for name, of in value.items())
        print(f"{key}: {value}", flush=True)
    for row in rows:
        found.append(row)
        print(_line(row, columns, ""), flush=True)
        if json_path:
            write_json(json_path, {"title": title, "environment": about, "rows": found})
    print_table(found, columns, title)
    lines = notes(found)
    print("\n".join(lines), flush=True)
    if json_path:
        write_json(json_path, {"title": title, "environment": about, "rows": found, "notes": lines})
        print(f"({json_path})", flush=True)
    return found


def print_table(rows: list[Row], columns: Columns, title: str) -> None:
    width = max((len(row["case"]) for row in rows), default=4)
    headings = (f"  {heading:>{_width(heading, form)}s}" for heading, form in columns.values())
    print(f"\n{title}\n{'':{width}s}{''.join(headings)}")
    for row in rows:
        print(_line(row, columns, width))


def _line(row: Row, columns: Columns, width: int | str) -> str:
    if "error" in row:
        return f"{row['case']:{width}s}  {row['error']}"
    cells = []
    for key, (heading, form) in columns.items():
        value = row.get(key)
        cells.append(f"  {'-' if value is None else format(value, form):>{_width(heading, form)}s}")
    return f"{row['case']:{width}s}{''.join(cells)}"


def _width(heading: str, form: str) -> int:
    return max(len(heading), 8 if form else 10)
