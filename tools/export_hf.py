"""Exports a checkpoint as a Hugging Face folder, for transformers, vLLM and the like.

python tools/export_hf.py --checkpoint runs/curriculum_nano --out runs/curriculum_nano/exports/hf
python tools/export_hf.py --checkpoint runs/1b/phase3/checkpoints/step_230000 --out exports/1b --dtype float32
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax import checkpoint
from nanollama_jax.console import console
from nanollama_jax.errors import ArgumentParser, one_line_errors
from nanollama_jax.export import hf
from nanollama_jax.files import output_path


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir (its latest checkpoint), or WORKDIR/checkpoints/step_N",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=tuple(hf.DTYPES),
        default="bfloat16",
        help="of the weights (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    arguments = parser.parse_args()
    with one_line_errors():
        output_path(arguments.out)
        loaded = checkpoint.load(arguments.checkpoint)
        hf.export(loaded, arguments.out, arguments.dtype, overwrite=arguments.overwrite)
    size = sum(file.stat().st_size for file in pathlib.Path(arguments.out).iterdir())
    console.print(
        f"{loaded.path}: {loaded.model.num_params:,} parameters -> {arguments.out} ({arguments.dtype}, {size / 1e6:,.1f} MB)"
    )


if __name__ == "__main__":
    main()
