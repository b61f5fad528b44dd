"""Import a Llama from elsewhere: a Hugging Face folder, or a .bin of llama2.c.

    nanollama import-hf --folder downloads/TinyLlama-1.1B --workdir runs/tinyllama
    nanollama import-hf --llama2c stories15M.bin --tokenizer tokenizer.bin \
--workdir runs/stories15M

The checkpoint can be generated with, evaluated and exported. To train on it, start a run whose
recipe has the same model and tokenizer with --config.init_from=WORKDIR.
"""

from nanollama_jax import checkpoint
from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.config import check_workdir
from nanollama_jax.console import console, error_console
from nanollama_jax.errors import one_line_errors
from nanollama_jax.export import hf_import, llama2c
from nanollama_jax.files import output_path


def main() -> None:
    parser = ArgumentParser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--folder",
        metavar="DIR",
        help="a Hugging Face folder: config.json, *.safetensors, tokenizer.model",
    )
    source.add_argument("--llama2c", metavar="FILE", help="a checkpoint of llama2.c, version 0")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="with --llama2c: its tokenizer.bin, or a SentencePiece .model",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where to write the checkpoint"
    )
    arguments = parser.parse_args()
    if bool(arguments.llama2c) != bool(arguments.tokenizer):
        parser.error("--llama2c and --tokenizer go together")
    with one_line_errors():
        output_path(arguments.workdir, "--workdir")
        check_workdir(arguments.workdir)
        if arguments.folder:
            loaded = hf_import.read(arguments.folder)
        else:
            loaded = llama2c.read(arguments.llama2c, arguments.tokenizer)
        written = checkpoint.save_weights(loaded, arguments.workdir)
    for name, reason in loaded.tokenizer.not_exportable.items():
        error_console.print(f"note: {name} cannot be exported from it: its tokenizer {reason}")
    console.print(
        f"{loaded.path}: {loaded.model.num_params:,} parameters, "
        f"context {loaded.context_length:,} -> {written}"
    )
