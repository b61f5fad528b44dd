"""What the project prints goes through `console` (stdout) and `error_console` (stderr), and is shown as it is.

Text is never read as markup or emoji names, wrapped or cut. On a terminal, control characters are shown escaped (`\\x1b`), not obeyed:
models and data are untrusted. Once this module is imported, stdout and stderr escape what their encoding lacks, and stdin lets bytes
that it cannot decode through as surrogates, which the tokenizer refuses; Python would raise.
"""

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import rich.console
import rich.table
from rich.cells import cell_len
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.text import Text

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a notebook's is not, and takes any text
        stream.reconfigure(errors="backslashreplace")
if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")

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
        self._chosen_width = options.get("width")  # not COLUMNS, which a shell sets for pipes too

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        size = super().size
        return size if self.is_terminal or self._chosen_width else size._replace(width=_UNLIMITED)

    def render_str(self, text: str, **options: Any) -> Text:
        """Cells and titles of tables; rich would remove some control characters and obey others."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, style: str | None = None, end: str = "\n", **options: Any) -> None:
        """Strings go out as they are, control characters escaped on a terminal, whatever `options` say; rich would wrap
        them and expand tabs."""
        if all(isinstance(item, str) for item in objects):
            text = " ".join(objects)
            line = [
                Segment(printable(text) if self.is_terminal else text, self.get_style(style or "none")),
                Segment(end),
            ]
            super().print(Segments(line), crop=False)
        else:
            crop = options.pop("crop", not isinstance(objects[0], rich.table.Table))
            super().print(*objects, style=style, end=end, crop=crop, **options)


console = Console()
error_console = Console(stderr=True)


class Table(rich.table.Table):
    """rich's table, but never cut: a cell without room folds, words and figures of up to WHOLE characters excepted."""

    WHOLE = 12

    def add_column(self, header: str = "", *, overflow: rich.console.OverflowMethod = "fold", **options: Any) -> None:
        super().add_column(header, overflow=overflow, **options)
        self._widen(self.columns[-1], header)

    def add_row(self, *cells: str | Text, **options: Any) -> None:
        super().add_row(*cells, **options)
        for column, cell in zip(self.columns, cells):
            self._widen(column, str(cell))

    def _widen(self, column: rich.table.Column, text: str) -> None:
        longest = max(map(cell_len, printable(text).split()), default=0)
        column.min_width = max(column.min_width or 1, min(longest, self.WHOLE))


def track(
    items: Iterable[Item],
    description: str,
    total: float | None = None,
    *,
    on: rich.console.Console = error_console,
    transient: bool = False,
) -> Iterator[Item]:
    """`items`, with a progress bar on a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=on, transient=transient, disable=not on.is_terminal) as progress:
        yield from progress.track(items, total, description=printable(description))
