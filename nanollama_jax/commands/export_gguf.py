"""Export a checkpoint as a GGUF file, for llama.cpp, Ollama or LM Studio.

    nanollama export-gguf --checkpoint runs/curriculum_nano --type q8_0 --out nano-q8_0.gguf
    nanollama export-gguf --checkpoint runs/1b/phase3 --type q4_k_m --out exports/1b-q4_k_m.gguf

As an installed package it needs an extra: pip install 'nanollama-jax[gguf]'.
"""

import pathlib

from nanollama_jax import checkpoint
from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import console
from nanollama_jax.errors import one_line_errors
from nanollama_jax.export import gguf
from nanollama_jax.files import output_file


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument(
        "--type",
        required=True,
        choices=gguf.TYPES,
        help="type of the weights; q8_0 and q4_k_m need disk space for a temporary f32 file",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    arguments = parser.parse_args()
    with one_line_errors():
        output_file(arguments.out)
        loaded = checkpoint.load(arguments.checkpoint)
        gguf.export(loaded, arguments.out, arguments.type, overwrite=arguments.overwrite)
    size = pathlib.Path(arguments.out).stat().st_size
    console.print(
        f"{loaded.path}: {loaded.model.num_params:,} parameters -> {arguments.out} "
        f"({arguments.type}, {size / 1e6:,.1f} MB)"
    )
