"""Check conversations (SFT) or preference pairs (DPO) before training.

    nanollama check-finetuning-data 'file://chats/*.jsonl'
    nanollama check-finetuning-data file://pairs.jsonl.zst \
'hf://NousResearch/hermes-function-calling-v1?name=func_calling' --strict

Rows may have any of the supported formats, which are recognised row by row: conversations.py and
preference.py in nanollama_jax/chat list them. Prints every bad row with its file and line, then a
summary of each file, and the mistakes by reason. Exits with status 2 if there is a bad row.
nanollama_jax/corpus/sources.py describes URLs.
"""

import collections
import re
import sys

from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import Table, console
from nanollama_jax.corpus.rows import check
from nanollama_jax.errors import BadInput, one_line_errors

COLUMNS = (
    "rows",
    "good",
    "bad",
    "pairs",
    "turns",
    "with thoughts",
    "with tools",
    "with calls",
    "characters",
)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("url", nargs="+", metavar="URL", help="a source of rows")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    arguments = parser.parse_args()
    reasons: collections.Counter[str] = collections.Counter()
    sources: list[collections.defaultdict[str, collections.Counter[str]]] = []  # files of each URL

    def on_bad(where: str, mistake: BadInput) -> None:
        if arguments.strict:
            raise mistake
        console.print(str(mistake))
        reasons[kind_of_mistake(where, str(mistake))] += 1

    with one_line_errors():
        try:
            for url in arguments.url:
                sources.append(collections.defaultdict(collections.Counter))
                check(url, sources[-1], on_bad)
        finally:  # also when a source cannot be read: what was read before it
            show(sources, reasons)
        if reasons:
            sys.exit(2)


def kind_of_mistake(where: str, mistake: str) -> str:
    """A mistake without what differs from row to row: its place, numbers and quoted data."""
    number = r"(?<![\w-])-?\d+(?:\.\d+)?(?:e[-+]\d+)?"
    quoted = r"\[.*?\]|(?<!\w)'[^']*'|\"[^\"]*\""
    return re.sub(f"{quoted}|{number}", "...", mistake.removeprefix(f"{where}: "))


def show(
    sources: list[collections.defaultdict[str, collections.Counter[str]]],
    reasons: collections.Counter[str],
) -> None:
    table = Table("file", title="turns are messages; with ... counts rows", title_style="")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for files in sources:
        for file, counts in files.items():
            table.add_row(file, *(f"{counts[column]:,}" for column in COLUMNS))
    if table.row_count:
        console.print(table)
    for reason, count in reasons.most_common():
        console.print(f"{count:9,}  {reason}")
