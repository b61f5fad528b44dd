"""Export a checkpoint as a Hugging Face folder, for transformers or vLLM.

    nanollama export-hf --checkpoint runs/curriculum_nano --out exports/nano
    nanollama export-hf --checkpoint runs/1b/phase3/checkpoints/step_230000 --out exports/1b \
--dtype float32
"""

import pathlib

from nanollama_jax import checkpoint
from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import console
from nanollama_jax.errors import one_line_errors
from nanollama_jax.export import hf
from nanollama_jax.files import output_path


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=tuple(hf.DTYPES),
        default="bfloat16",
        help="dtype of the weights (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    arguments = parser.parse_args()
    with one_line_errors():
        output_path(arguments.out)
        loaded = checkpoint.load(arguments.checkpoint)
        hf.export(loaded, arguments.out, arguments.dtype, overwrite=arguments.overwrite)
    size = sum(file.stat().st_size for file in pathlib.Path(arguments.out).iterdir())
    console.print(
        f"{loaded.path}: {loaded.model.num_params:,} parameters -> {arguments.out} "
        f"({arguments.dtype}, {size / 1e6:,.1f} MB)"
    )
