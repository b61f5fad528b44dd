"""Trains a SentencePiece tokenizer on equal shares of one or more sources (URLs as in nanollama_jax/corpus/sources.py).

python tools/train_tokenizer.py --source builtin://docs --source 'file://texts/*.jsonl.zst' --out data/tokenizer.model
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax.console import console
from nanollama_jax.corpus.prepare import train_tokenizer_for
from nanollama_jax.errors import ArgumentParser, BadInput, one_line_errors
from nanollama_jax.files import output_file
from nanollama_jax.tokenizer import Tokenizer


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="URL",
        help="what to train on; can be given several times",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=32000,
        help="pieces, the 256 bytes included (default: %(default)s)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the .model file"
    )
    parser.add_argument(
        "--max_bytes",
        type=int,
        default=1_000_000_000,
        help="how much text to train on (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with one_line_errors():
        if output_file(arguments.out).exists():
            raise BadInput(f"{arguments.out} exists: remove it or choose another --out")
        train_tokenizer_for(
            arguments.source, arguments.out, arguments.vocab_size, arguments.max_bytes
        )
        tokenizer = Tokenizer(arguments.out)
    console.print(f"{arguments.out}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    main()
