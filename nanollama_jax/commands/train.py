"""Train a recipe, a whole curriculum, or your own text.

    nanollama train --text 'texts/**/*.txt' --size 60m
    nanollama train --config configs/curriculum.py:nano
    nanollama train --config configs/phase1.py --workdir runs/1b/phase1
    nanollama train --config configs/phase1.py:nano --config.optimizer.peak_lr=1e-3
    nanollama train --config configs/phase1.py:nano --print_config

Every value of the recipe can be overridden by its name. Rerun the command to resume. With several
hosts, run it on each with --coordinator=HOST:PORT --num_processes=N --process_id=I
(--coordinator=auto under Slurm or Open MPI). SIGTERM, SIGHUP, SIGUSR1, SIGQUIT and Ctrl-C during
training save a checkpoint, then exit with status 0; a second Ctrl-C exits at once.
"""

import os
import pathlib

from absl import app, flags
from ml_collections import ConfigDict, config_flags

import nanollama_jax
from nanollama_jax import distributed, process, settings
from nanollama_jax.command_line import flags_parser
from nanollama_jax.errors import one_line_errors
from nanollama_jax.recipes import MODELS, own

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with an optional scale: configs/phase1.py:nano.", lock_config=True
)
TEXT = flags.DEFINE_string(
    "text", None, "Instead of --config: a file, a glob or a source URL to train on."
)
SIZE = flags.DEFINE_enum("size", "nano", list(MODELS), "With --text: size of the model.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, logs and curves. Default: runs/RECIPE_SCALE."
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print the config as it would run on this machine, and exit."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, or auto; only with several processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "On a GPU: the same bits from the same command, resumed or not. Slower, and attention takes "
    "far more memory.",
)


def main() -> None:
    process.set_up()
    app.run(exit_alone, flags_parser=flags_parser(CONFIG, __name__, instead=TEXT))


def exit_alone(argv: list[str]) -> None:
    """One of several processes that fails does not wait for the others to exit."""
    try:
        train(argv)
    except BaseException as error:
        distributed.leave(error)
        raise


def train(_: list[str]) -> None:
    settings.apply(DETERMINISTIC.value)  # before jax is imported
    with one_line_errors():
        config = own(SIZE.value) if CONFIG.value is None else CONFIG.value
        if TEXT.value is not None:
            config.text = TEXT.value
        if PRINT_CONFIG.value:
            print_config(config)
            return
        with distributed.joined(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value):
            settings.keep_compiled()
            workdir = default_workdir(config) if WORKDIR.value is None else WORKDIR.value
            nanollama_jax.train(config, workdir)


def default_workdir(config: ConfigDict) -> str:
    if "text" in config:
        from nanollama_jax.own import default_workdir

        return default_workdir(config)
    recipe = str(flags.FLAGS["config"].config_filename).partition(":")[0]
    return os.path.join("runs", f"{pathlib.Path(recipe).stem}_{config.scale}")


def print_config(config: ConfigDict) -> None:
    from nanollama_jax.config.show import lines
    from nanollama_jax.console import console
    from nanollama_jax.curriculum import stages_of
    from nanollama_jax.train.settle import resolve

    stages = {} if "text" in config else stages_of(config)
    for line in lines(config, {name: resolve(stage) for name, stage in stages.items()}):
        console.print(line)
