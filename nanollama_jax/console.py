"""All output of the project: `console` (stdout) and `error_console` (stderr) print text verbatim.

Text is never read as markup or emoji names, wrapped or cut. On a terminal, control characters are
escaped (`\\x1b`): models and data are untrusted. Importing this module makes stdout and stderr
escape characters that their encoding lacks, and makes stdin pass undecodable bytes on as
surrogates, which the tokenizer refuses; by default Python would raise.
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
    if isinstance(stream, io.TextIOWrapper):  # a notebook's is not, and accepts any text
        stream.reconfigure(errors="backslashreplace")
if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")

_ESCAPES = {
    code: chr(code).encode("unicode_escape").decode()
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}
_UNLIMITED = 100_000  # columns

Item = TypeVar("Item")


def printable(text: str) -> str:
    """`text` with control characters escaped, except newlines and tabs."""
    return text.translate(_ESCAPES)


class Console(rich.console.Console):
    """rich's console for verbatim text; without a terminal, tables are as wide as their content."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self._chosen_width = options.get("width")  # not COLUMNS, which a shell sets for pipes too

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        size = super().size
        unlimited = not self.is_terminal and not self._chosen_width
        return size._replace(width=_UNLIMITED) if unlimited else size

    def render_str(self, text: str, **options: Any) -> Text:
        """For cells and titles of tables: rich would drop some control characters, obey others."""
        return super().render_str(printable(text), **options)

    def print(
        self, *objects: Any, style: str | None = None, end: str = "\n", **options: Any
    ) -> None:
        """Prints strings verbatim, with control characters escaped on a terminal.

        `options` do not apply to strings; rich would wrap them and expand tabs.
        """
        if all(isinstance(item, str) for item in objects):
            text = " ".join(objects)
            text = printable(text) if self.is_terminal else text
            line = [Segment(text, self.get_style(style or "none")), Segment(end)]
            super().print(Segments(line), crop=False)
        else:
            crop = options.pop("crop", not isinstance(objects[0], rich.table.Table))
            super().print(*objects, style=style, end=end, crop=crop, **options)


console = Console()
error_console = Console(stderr=True)


class Table(rich.table.Table):
    """rich's table, never cut: cells fold, except words and figures of up to WHOLE characters."""

    WHOLE = 12

    def add_column(
        self, header: str = "", *, overflow: rich.console.OverflowMethod = "fold", **options: Any
    ) -> None:
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
    with Progress(
        *columns, console=on, transient=transient, disable=not on.is_terminal
    ) as progress:
        yield from progress.track(items, total, description=printable(description))
