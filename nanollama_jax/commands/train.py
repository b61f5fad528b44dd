"""Train a recipe: one stage, or a whole curriculum.

    nanollama train --config configs/curriculum.py:nano
    nanollama train --config configs/phase1.py --workdir runs/1b/phase1
    nanollama train --config configs/phase1.py:nano --config.optimizer.peak_lr=1e-3

Every value of the recipe can be overridden by its name. Rerun the command to resume. With several
hosts, run it on each with --coordinator=HOST:PORT --num_processes=N --process_id=I
(--coordinator=auto under Slurm or Open MPI). SIGTERM, SIGHUP, SIGUSR1, SIGQUIT and Ctrl-C during
training save a checkpoint, then exit with status 0; a second Ctrl-C exits at once.
"""

import os
import pathlib

from absl import app, flags
from ml_collections import config_flags

import nanollama_jax
from nanollama_jax import distributed, process, settings
from nanollama_jax.command_line import flags_parser
from nanollama_jax.errors import one_line_errors

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with an optional scale: configs/phase1.py:nano.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, logs and curves go. Default: runs/RECIPE_SCALE."
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
    app.run(exit_alone, flags_parser=flags_parser(CONFIG, __name__))


def exit_alone(argv: list[str]) -> None:
    """One of several processes that fails does not wait for the others to exit."""
    try:
        train(argv)
    except BaseException as error:
        distributed.leave(error)
        raise


def train(_: list[str]) -> None:
    settings.apply(DETERMINISTIC.value)  # before jax is imported
    with (
        one_line_errors(),
        distributed.joined(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value),
    ):
        settings.keep_compiled()
        workdir = default_workdir() if WORKDIR.value is None else WORKDIR.value
        nanollama_jax.train(CONFIG.value, workdir)


def default_workdir() -> str:
    recipe = str(flags.FLAGS["config"].config_filename).partition(":")[0]
    return os.path.join("runs", f"{pathlib.Path(recipe).stem}_{CONFIG.value.scale}")
