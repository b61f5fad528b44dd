"""Checks data to fine-tune on before a run does: conversations for SFT and preference pairs for DPO, in any of their formats, told apart by row
(nanollama_jax/data/conversations.py and preference.py list them). Shows what each file holds and which rows are bad; exits with 2 if any is.

python tools/check_finetuning_data.py 'file://chats/*.jsonl'
python tools/check_finetuning_data.py file://pairs.jsonl.zst 'hf://NousResearch/hermes-function-calling-v1?name=func_calling' --strict
"""

import argparse
import collections
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanollama_jax.data.preference import check, kind_of_mistake
from nanollama_jax.errors import BadInput, one_line_errors

COLUMNS = ("rows", "good", "bad", "pairs", "turns", "with thoughts", "with tools", "with calls", "characters")
SHOWN = 20  # bad rows in full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="+", metavar="URL", help="a source, as in nanollama_jax/data/sources.py")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    arguments = parser.parse_args()
    bad: list[tuple[str, str]] = []

    def on_bad(where: str, mistake: BadInput) -> None:
        if arguments.strict:
            raise mistake
        bad.append((where, str(mistake)))

    sys.stdout.reconfigure(errors="replace")  # names in the data hold characters that not every terminal has
    with one_line_errors():
        table = Table("file", title="turns are messages; with ... counts rows", title_style="")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for url in arguments.url:
            for file, counts in check(url, on_bad).items():
                table.add_row(escape(file), *(f"{counts[column]:,}" for column in COLUMNS))
        Console(width=None if sys.stdout.isatty() else 200).print(table)
        for _, mistake in bad[:SHOWN]:
            print(mistake)
        if bad[SHOWN:]:
            print(f"and {len(bad) - SHOWN:,} more; all {len(bad):,} bad rows by reason:")
            for reason, count in collections.Counter(kind_of_mistake(*each) for each in bad).most_common():
                print(f"{count:9,}  {reason}")
        if bad:
            sys.exit(2)


if __name__ == "__main__":
    main()
