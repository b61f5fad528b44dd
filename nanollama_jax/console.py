"""What the project prints goes through `console` (stdout) and `error_console` (stderr), and is shown as it is.

Text is never read as markup or emoji names, wrapped or cut. On a terminal, control characters are shown escaped (`\\x1b`), not obeyed:
models and data are untrusted. Importing this module makes stdout and stderr escape what their encoding lacks, instead of raising.
"""

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import rich.console
import rich.table
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.text import Text

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a notebook's is not, and takes any text
        stream.reconfigure(errors="backslashreplace")

_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_UNLIMITED = 100_000  # columns

Item = TypeVar("Item")


def printable(text: str) -> str:
    """`text` with control characters escaped, newlines and tabs excepted."""
    return text.translate(_ESCAPES)


class Console(rich.console.Console):
    """rich's console for text as it is, and for tables that are as wide as their content where there is no terminal."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        size = super().size
        return size if self.is_terminal or self._width is not None else size._replace(width=_UNLIMITED)

    def render_str(self, text: str, **options: Any) -> Text:
        """Cells and titles of tables; rich would remove some control characters and obey others."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, style: str | None = None, end: str = "\n", **options: Any) -> None:
        """Strings go out as they are, control characters escaped on a terminal; rich would wrap them and expand tabs."""
        if not all(isinstance(item, str) for item in objects):
            super().print(*objects, style=style, end=end, **options)
            return
        text = " ".join(objects) + end
        segment = Segment(printable(text) if self.is_terminal else text, self.get_style(style or "none"))
        super().print(Segments([segment]), crop=False)


console = Console()
error_console = Console(stderr=True)


class Table(rich.table.Table):
    """rich's table, but a cell without room folds; rich would cut it."""

    def add_column(self, *header: Any, overflow: rich.console.OverflowMethod = "fold", **options: Any) -> None:
        super().add_column(*header, overflow=overflow, **options)


def track(
    items: Iterable[Item], description: str, total: float | None = None, *, on: rich.console.Console = error_console, transient: bool = False
) -> Iterator[Item]:
    """`items`, with a progress bar on a terminal."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, console=on, transient=transient, disable=not on.is_terminal) as progress:
        yield from progress.track(items, total, description=printable(description))
