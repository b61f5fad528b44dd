"""Exports a checkpoint as a GGUF file, for llama.cpp, Ollama, LM Studio and the like.

python tools/export_gguf.py --checkpoint runs/curriculum_nano --type q8_0 --out runs/curriculum_nano/exports/nano-q8_0.gguf
python tools/export_gguf.py --checkpoint runs/1b/phase3 --type q4_k_m --out exports/1b-q4_k_m.gguf
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax import checkpoint
from nanollama_jax.console import console
from nanollama_jax.errors import ArgumentParser, one_line_errors
from nanollama_jax.export import gguf
from nanollama_jax.files import output_file


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir (its latest checkpoint), or WORKDIR/checkpoints/step_N",
    )
    parser.add_argument(
        "--type",
        required=True,
        choices=gguf.TYPES,
        help="of the weights; q8_0 and q4_k_m need the disk for an f32 file meanwhile",
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
        f"{loaded.path}: {loaded.model.num_params:,} parameters -> {arguments.out} ({arguments.type}, {size / 1e6:,.1f} MB)"
    )


if __name__ == "__main__":
    main()
