"""Searches text, or a corpus that is already prepared, for the items of benchmarks. Preparation does so itself (config.data.benchmarks).

    python tools/decontaminate.py 'file://texts/*.jsonl.zst'                               all benchmarks of nanollama_jax/recipes/corpora.py
    python tools/decontaminate.py data/fineweb_edu --tokenizer data/tokenizer.model        what is left in a prepared corpus
    python tools/decontaminate.py file://page.txt --benchmark gsm8k=file://gsm8k/test.jsonl    is an item in this text?

Names of benchmarks, which say how their records are read: mmlu, gsm8k, hellaswag, arc, truthfulqa, mt_bench, bfcl, and text. The report names
document, item and span of each hit.
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax.console import Table, console
from nanollama_jax.corpus import decontaminate, sources
from nanollama_jax.errors import ArgumentParser, BadInput, one_line_errors
from nanollama_jax.files import output_file, write_json
from nanollama_jax.recipes import BENCHMARKS
from nanollama_jax.tokenizer import Tokenizer


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
    parser.add_argument("--tokenizer", metavar="FILE", help="that of a prepared corpus")
    parser.add_argument(
        "--out",
        default="contaminated_ids.json",
        metavar="FILE",
        help="where to write the report (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with one_line_errors():
        if unnamed := [one for one in arguments.benchmark if "=" not in one]:
            raise BadInput(
                f"--benchmark {unnamed[0]}: write NAME=URL, as in gsm8k=file://gsm8k/test.jsonl"
            )
        named = [one.split("=", 1) for one in arguments.benchmark]
        if len(dict(named)) < len(named):
            raise BadInput("--benchmark: a name is given twice: write gsm8k=URL and gsm8k_2=URL")
        if (out := output_file(arguments.out)).exists() or not out.parent.is_dir():
            raise BadInput(
                f"--out {out}: there is {'such a file already' if out.exists() else 'no such folder'}: choose another name"
            )
        if "://" in arguments.text:
            documents = sources.read_documents(arguments.text, 0, 1)
        elif arguments.tokenizer:
            documents = sources.read_prepared(arguments.text, Tokenizer(arguments.tokenizer))
        else:
            raise BadInput(
                f"{arguments.text} is no source URL, as in file://texts/*.txt: of a prepared corpus, name the --tokenizer too"
            )
        index = decontaminate.Index(decontaminate.read_benchmarks(dict(named) or BENCHMARKS))
        report = decontaminate.search(documents, index, show)
        write_json(out, report)
    table = Table("benchmark", "items", "found", "in documents", title=arguments.out)
    for name, counts in report["benchmarks"].items():
        table.add_row(
            name, f"{counts['items']:,}", f"{counts['items_found']:,}", f"{counts['documents']:,}"
        )
    console.print(table)
    megabytes, short = report["bytes"] / 1e6, index.too_short.total()
    console.print(
        f"{report['documents']:,} documents, {megabytes:,.1f} MB; {short:,} questions are too short to search for"
    )


_started = _last = time.monotonic()


def show(documents: int, size: int, hits: int) -> None:
    global _last
    if (now := time.monotonic()) - _last >= 10:
        _last = now
        console.print(
            f"{documents:,} documents, {size / 1e6:,.0f} MB, {size / 1e6 / (now - _started):.1f} MB/s, {hits:,} hits"
        )


if __name__ == "__main__":
    main()
