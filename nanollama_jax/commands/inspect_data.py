"""Show what a recipe's stages will read: epochs, packed rows, lengths.

    nanollama inspect-data --config configs/phase2_16k.py --out phase2_16k.png
    nanollama inspect-data --config configs/curriculum.py:nano --stage phase1 --rows 200
    nanollama inspect-data --config configs/phase2_16k.py --config.data.sources.pg19=0.8

The corpora must be prepared (nanollama prepare-data). With several stages each has a picture of its
own, FILE_STAGE.png. The rows shown are the first in a source's order, at the stage's row length; in
training a later stage continues where the previous one stopped.
"""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from nanollama_jax.command_line import flags_parser
from nanollama_jax.console import console
from nanollama_jax.corpus import mix_report
from nanollama_jax.curriculum import stages_of
from nanollama_jax.data import mix
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.files import output_file
from nanollama_jax.tokenizer import Tokenizer

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with an optional scale: configs/phase2_16k.py:nano.", lock_config=True
)
STAGE = flags.DEFINE_string("stage", None, "One stage of a curriculum. Default: all of them.")
ROWS = flags.DEFINE_integer(
    "rows", 1000, "Packed rows to read of each source, at most one epoch.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "A PNG to draw, in an existing folder.")


def main() -> None:
    app.run(inspect, flags_parser=flags_parser(CONFIG, __name__))


def inspect(_: list[str]) -> None:
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
                f"{', '.join(stages)} trains on conversations: check them with "
                "nanollama check-finetuning-data"
            )
        pictures = picture_paths(output_file(OUT.value), names) if OUT.value is not None else {}
        tokenizer = Tokenizer(config.tokenizer.path)
        mixes = [mix.open_mix(stages[name], tokenizer) for name in names]
        for stage in mixes:
            rows = {
                name: mix.read_rows(stage, name, tokenizer, ROWS.value, console)
                for name in stage.sources
            }
            mix_report.report(stage, rows, tokenizer, console)
            if pictures:
                mix_report.plot(stage, rows, pictures[stage.name])
                console.print(f"picture: {pictures[stage.name]}", soft_wrap=True)
        if len(mixes) > 1:
            total = mix.epochs_of_all(mixes)
            epochs = ", ".join(f"{name} {times:.2f} epochs" for name, times in total.items())
            console.print(f"all stages together: {epochs}", soft_wrap=True)
            for line in mix.repetition_warnings(total, "all stages together"):
                console.print(f"warning: {line}", style="yellow", soft_wrap=True)


def picture_paths(out: pathlib.Path, names: list[str]) -> dict[str, pathlib.Path]:
    """The picture of each stage. Raises `BadInput`, before the data is read, if one cannot be
    written."""
    if not out.parent.is_dir():
        raise BadInput(
            f"--out={out}: there is no folder {out.parent}; create it, or choose another --out"
        )
    paths = {name: out.with_stem(f"{out.stem}_{name}") if len(names) > 1 else out for name in names}
    for path in paths.values():
        if path.is_dir():
            raise BadInput(f"--out={out}: {path} is a folder; choose another --out")
    return paths
