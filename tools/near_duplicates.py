"""Finds near-duplicate documents within and across sources, and writes a report that preparation can leave documents out by.

    python tools/near_duplicates.py 'file://texts/*.jsonl.zst' --out near_duplicates.json
    python tools/near_duplicates.py hf://OWNER/NAME builtin://docs --out near_duplicates.json --threshold 0.9

Source URLs: nanollama_jax/corpus/sources.py; write them as the recipe does, for a document's id begins with them. What counts as a duplicate,
and memory: nanollama_jax/corpus/near_duplicates.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax.console import Table, console
from nanollama_jax.corpus.near_duplicates import find_near_duplicates
from nanollama_jax.errors import ArgumentParser, one_line_errors
from nanollama_jax.files import output_file


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE_URL", help="of duplicates, the first source's is kept"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the report, JSON"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="Jaccard similarity from which two are duplicates (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with one_line_errors():
        output_file(arguments.out)
        report = find_near_duplicates(
            arguments.sources, arguments.out, threshold=arguments.threshold
        )
    for example in report["examples"]:
        for title, text in zip(
            (f"\n{example['jaccard']:.2f}  {example['id']}", f"  of  {example['duplicate_of']}"),
            example["texts"],
        ):
            console.print(f"{title}\n      {' '.join(text.split())}")
    table = Table(
        "", "documents", "bytes", title=f"near-duplicates at {arguments.threshold}: {arguments.out}"
    )
    table.add_row("read", f"{report['documents']:,}", f"{report['bytes']:,}")
    table.add_row(
        "to leave out", f"{report['documents_to_leave_out']:,}", f"{report['bytes_to_leave_out']:,}"
    )
    table.add_row("of them, linked only by others", f"{report['linked_by_others']:,}", "")
    console.print(table)
    sizes = ", ".join(f"{count:,} of {size}" for size, count in report["cluster_sizes"].items())
    console.print(f"{report['clusters']:,} clusters: {sizes or 'none'}")


if __name__ == "__main__":
    main()
