"""Train a SentencePiece tokenizer on equal shares of one or more sources.

    nanollama train-tokenizer --source builtin://docs --source 'file://texts/*.jsonl.zst' \
--out data/tokenizer.model

nanollama_jax/corpus/sources.py describes source URLs.
"""

from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import console
from nanollama_jax.corpus.prepare import train_tokenizer_for
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.files import output_file
from nanollama_jax.tokenizer import Tokenizer


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="URL",
        help="text to train on; may be given several times",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=32000,
        help="number of pieces, including the 256 bytes (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the .model file to write")
    parser.add_argument(
        "--max_bytes",
        type=int,
        default=1_000_000_000,
        help="bytes of text to train on (default: %(default)s)",
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
