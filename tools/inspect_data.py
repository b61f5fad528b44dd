"""Shows what a recipe's stages will read: epochs of each source, what is in the packed rows, and how many of them need their length.

    python tools/inspect_data.py --config configs/phase2_16k.py --out phase2_16k.png
    python tools/inspect_data.py --config configs/curriculum.py:nano --stage phase1 --rows 200
    python tools/inspect_data.py --config configs/phase2_16k.py --config.data.sources.pg19=0.8      another mix, before it costs anything

The corpora must be prepared (tools/prepare_data.py). With several stages, each has a picture of its own: FILE_STAGE.png.
The rows shown are the first of a source's order, at the stage's row length; in training a later stage goes on where the one before stopped.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import app, flags
from ml_collections import config_flags

from nanollama_jax.console import console
from nanollama_jax.corpus import mix_report
from nanollama_jax.curriculum import stages_of
from nanollama_jax.data import mix
from nanollama_jax.errors import BadInput, flags_parser, one_line_errors
from nanollama_jax.files import output_file
from nanollama_jax.tokenizer import Tokenizer

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, as in configs/phase2_16k.py.", lock_config=True
)
STAGE = flags.DEFINE_string("stage", None, "One stage of a curriculum. Default: all of them.")
ROWS = flags.DEFINE_integer(
    "rows", 1000, "Packed rows to read of each source; at most an epoch is.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "A PNG to draw, in a folder that exists.")


def picture_paths(out: pathlib.Path, names: list[str]) -> dict[str, pathlib.Path]:
    """Stage -> its picture. Raises BadInput where none could be written: better known before the reading."""
    if not out.parent.is_dir():
        raise BadInput(
            f"--out={out}: there is no folder {out.parent}; make it, or choose another --out"
        )
    paths = {name: out.with_stem(f"{out.stem}_{name}") if len(names) > 1 else out for name in names}
    for path in paths.values():
        if path.is_dir():
            raise BadInput(f"--out={out}: {path} is a folder; choose another --out")
    return paths


def main(_: list[str]) -> None:
    with one_line_errors():
        config = CONFIG.value
        stages = stages_of(config)
        if STAGE.value not in (None, *stages):
            raise BadInput(f"--stage={STAGE.value}: this config has {', '.join(stages)}")
        if STAGE.value:
            stages = {STAGE.value: stages[STAGE.value]}
        names = [name for name, stage in stages.items() if stage.task == "pretrain"]
        if not names:
            raise BadInput(
                f"{', '.join(stages)} trains on conversations: tools/check_finetuning_data.py reads those"
            )
        pictures = picture_paths(output_file(OUT.value), names) if OUT.value is not None else {}
        tokenizer = Tokenizer(config.tokenizer.path)
        stages = [mix.open_mix(stages[name], tokenizer) for name in names]
        for stage in stages:
            rows = {
                name: mix.read_rows(stage, name, tokenizer, ROWS.value, console)
                for name in stage.sources
            }
            mix_report.report(stage, rows, tokenizer, console)
            if pictures:
                mix_report.plot(stage, rows, pictures[stage.name])
                console.print(f"picture: {pictures[stage.name]}", soft_wrap=True)
        if len(stages) > 1:
            total = mix.epochs_of_all(stages)
            console.print(
                "all stages together: "
                + ", ".join(f"{name} {times:.2f} epochs" for name, times in total.items()),
                soft_wrap=True,
            )
            for line in mix.repetition_warnings(total, "all stages together"):
                console.print(f"warning: {line}", style="yellow", soft_wrap=True)


if __name__ == "__main__":
    app.run(main, flags_parser=flags_parser(CONFIG))
