"""Find near-duplicate documents within and across sources.

    nanollama near-duplicates 'file://texts/*.jsonl.zst' --out near_duplicates.json
    nanollama near-duplicates hf://OWNER/NAME builtin://docs --out near_duplicates.json \
--threshold 0.9

Preparation leaves out the documents of the report that config.corpora.NAME.leave_out names. Write
the source URLs as in the recipe: document ids begin with them. nanollama_jax/corpus/sources.py
describes URLs, and nanollama_jax/corpus/near_duplicates.py what counts as a duplicate.
"""

from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import Table, console
from nanollama_jax.corpus.near_duplicates import find_near_duplicates
from nanollama_jax.errors import one_line_errors
from nanollama_jax.files import output_file


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE_URL",
        help="of duplicates in several sources, the first source's is kept",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON report to write")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="Jaccard similarity from which two documents are duplicates (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with one_line_errors():
        output_file(arguments.out)
        report = find_near_duplicates(
            arguments.sources, arguments.out, threshold=arguments.threshold
        )
    for example in report["examples"]:
        titles = (
            f"\n{example['jaccard']:.2f}  {example['id']}",
            f"  of  {example['duplicate_of']}",
        )
        for title, text in zip(titles, example["texts"]):
            console.print(f"{title}\n      {' '.join(text.split())}")
    table = Table(
        "", "documents", "bytes", title=f"near-duplicates at {arguments.threshold}: {arguments.out}"
    )
    table.add_row("read", f"{report['documents']:,}", f"{report['bytes']:,}")
    table.add_row(
        "to leave out", f"{report['documents_to_leave_out']:,}", f"{report['bytes_to_leave_out']:,}"
    )
    table.add_row("linked only through others", f"{report['linked_by_others']:,}", "")
    console.print(table)
    sizes = ", ".join(f"{count:,} of {size}" for size, count in report["cluster_sizes"].items())
    console.print(f"{report['clusters']:,} clusters: {sizes or 'none'}")
