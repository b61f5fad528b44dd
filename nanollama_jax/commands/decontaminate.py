"""Search text, or a prepared corpus, for the items of benchmarks.

    nanollama decontaminate 'file://texts/*.jsonl.zst'
    nanollama decontaminate data/fineweb_edu --tokenizer data/tokenizer.model
    nanollama decontaminate file://page.txt --benchmark gsm8k=file://gsm8k/test.jsonl

The default benchmarks are those of nanollama_jax/recipes/corpora.py, read from
the hub. The name of a benchmark
says how its records are read: mmlu, gsm8k, hellaswag, arc, truthfulqa, mt_bench, bfcl or text. The
report lists document, item and span of each hit. Preparation runs the same search itself
(config.data.benchmarks).
"""

import pathlib
import time
from collections.abc import Iterator

from datatrove.data import Document

from nanollama_jax.command_line import ArgumentParser, named_urls
from nanollama_jax.console import Table, console
from nanollama_jax.corpus import decontaminate, sources
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.files import output_file, write_json
from nanollama_jax.recipes import BENCHMARKS
from nanollama_jax.tokenizer import Tokenizer

SECONDS = 10  # between two lines of progress


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("text", help="a source URL, or the folder of a prepared corpus")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="may be given several times (default: those of the recipes)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the tokenizer of a prepared corpus")
    parser.add_argument(
        "--out",
        default="contaminated_ids.json",
        metavar="FILE",
        help="where to write the report (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with one_line_errors():
        benchmarks = named_urls(arguments.benchmark) or BENCHMARKS
        check_out(output_file(arguments.out))
        documents = read(arguments.text, arguments.tokenizer)
        index = decontaminate.Index(decontaminate.read_benchmarks(benchmarks))
        report = decontaminate.search(documents, index, Progress().show)
        write_json(arguments.out, report)
    table = Table("benchmark", "items", "found", "in documents", title=arguments.out)
    for name, counts in report["benchmarks"].items():
        table.add_row(
            name, f"{counts['items']:,}", f"{counts['items_found']:,}", f"{counts['documents']:,}"
        )
    console.print(table)
    console.print(
        f"{report['documents']:,} documents, {report['bytes'] / 1e6:,.1f} MB; "
        f"{index.too_short.total():,} questions are too short to search for"
    )


def check_out(out: pathlib.Path) -> None:
    if out.exists():
        raise BadInput(f"--out {out} exists: choose another name")
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}: choose another name")


def read(text: str, tokenizer: str | None) -> Iterator[Document]:
    if "://" in text:
        return sources.read_documents(text, 0, 1)
    if tokenizer:
        return sources.read_prepared(text, Tokenizer(tokenizer))
    raise BadInput(
        f"{text} is no source URL, as in file://texts/*.txt; for a prepared corpus, also give "
        "--tokenizer"
    )


class Progress:
    """A line every few seconds."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()

    def show(self, documents: int, size: int, hits: int) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS:
            return
        self.last = now
        rate = size / 1e6 / (now - self.started)
        console.print(
            f"{documents:,} documents, {size / 1e6:,.0f} MB, {rate:.1f} MB/s, {hits:,} hits"
        )
