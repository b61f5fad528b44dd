"""Checks data to fine-tune on before a run does: conversations for SFT and preference pairs for DPO, in any of their formats, told apart by row
(nanollama_jax/chat/conversations.py and preference.py list them). Prints every bad row by file and line, then what each file holds and the
mistakes by reason; exits with 2 if there is any.

python tools/check_finetuning_data.py 'file://chats/*.jsonl'
python tools/check_finetuning_data.py file://pairs.jsonl.zst 'hf://NousResearch/hermes-function-calling-v1?name=func_calling' --strict
"""

import collections
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax.console import Table, console
from nanollama_jax.corpus.rows import check
from nanollama_jax.errors import ArgumentParser, BadInput, one_line_errors

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
    parser.add_argument(
        "url", nargs="+", metavar="URL", help="a source, as in nanollama_jax/corpus/sources.py"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    arguments = parser.parse_args()
    reasons: collections.Counter[str] = collections.Counter()
    sources: list[collections.defaultdict[str, collections.Counter[str]]] = []  # each URL's files

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
        finally:  # what was read before a source that cannot be
            show(sources, reasons)
        if reasons:
            sys.exit(2)


def kind_of_mistake(where: str, mistake: str) -> str:
    """The words of a mistake without what differs from row to row: place, numbers and what is quoted from the data."""
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


if __name__ == "__main__":
    main()
