"""Shows what a recipe's stages will read: epochs of each source, what is in the packed rows, and how many of them need their length.

    python tools/inspect_data.py --config configs/phase2_16k.py --out phase2_16k.png
    python tools/inspect_data.py --config configs/curriculum.py:nano --stage phase1 --rows 200
    python tools/inspect_data.py --config configs/phase2_16k.py --config.data.sources.pg19=0.8      another mix, before it costs anything

The corpora must be prepared (tools/prepare_data.py). With several stages, each has a picture of its own: FILE_STAGE.png.
"""

import collections
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from nanollama_jax.curriculum import stage_config, stage_names
from nanollama_jax.data import mix, mix_report
from nanollama_jax.errors import BadInput, flags_parser, one_line_errors
from nanollama_jax.tokenizer import Tokenizer

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, as in configs/phase2_16k.py.", lock_config=True)
STAGE = flags.DEFINE_string("stage", None, "One stage of a curriculum. Default: all of them.")
ROWS = flags.DEFINE_integer("rows", 1000, "Packed rows to read of each source; at most an epoch is.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "A PNG to draw.")


def main(_: list[str]) -> None:
    with one_line_errors():
        config = CONFIG.value
        names = stage_names(config) if "stages" in config else [config.name]
        if STAGE.value not in (None, *names):
            raise BadInput(f"--stage={STAGE.value}: this config has {', '.join(names)}")
        names = [STAGE.value] if STAGE.value else names
        sys.stdout.reconfigure(errors="replace")  # texts hold characters that not every terminal has
        console, tokenizer, total = Console(highlight=False, markup=False), Tokenizer(config.tokenizer.path), collections.Counter()
        stages = [mix.open_mix(stage_config(config, name, "") if "stages" in config else config, tokenizer) for name in names]
        for stage in stages:
            rows = {name: mix.read_rows(stage, name, tokenizer, ROWS.value, console) for name in stage.sources}
            mix_report.report(stage, rows, tokenizer, console)
            total.update(stage.epochs)
            if OUT.value:
                path = pathlib.Path(OUT.value)
                path = path if len(stages) == 1 else path.with_stem(f"{path.stem}_{stage.name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                mix_report.plot(stage, rows, path)
                console.print(f"picture: {path}", soft_wrap=True)
        if len(stages) > 1:
            console.print("all stages together: " + ", ".join(f"{name} {times:.2f} epochs" for name, times in total.items()), soft_wrap=True)
            for line in mix.repetition_warnings(total, "all stages together"):
                console.print(f"warning: {line}", style="yellow", soft_wrap=True)


if __name__ == "__main__":
    app.run(main, flags_parser=flags_parser(CONFIG))
