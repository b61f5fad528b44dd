"""Trains: one phase, or a whole curriculum. The config file says what; everything in it can be overridden on the command line.

python main.py --config configs/curriculum.py:nano                                   all stages, minutes on a laptop CPU
python main.py --config configs/phase1.py --workdir runs/1b/phase1                   one phase of the 1B model
python main.py --config configs/phase1.py:nano --config.optimizer.peak_lr=1e-3       any value of the config, by its name

The same command resumes. With several hosts, run it on each with --coordinator=HOST:PORT --num_processes=N --process_id=I (--coordinator=auto
under Slurm or Open MPI). SIGTERM, SIGHUP, SIGUSR1, SIGQUIT or Ctrl-C during training save a checkpoint, then exit 0; a second Ctrl-C ends at once.
"""

if __name__ == "__main__":  # not in the workers that prepare data, which import this file
    from nanollama_jax import process

    process.set_up()  # before the imports below, which take seconds

import os
import pathlib

from absl import app, flags
from ml_collections import config_flags

from nanollama_jax import distributed, settings
from nanollama_jax.command_line import flags_parser
from nanollama_jax.errors import one_line_errors

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Recipe, with an optional scale after a colon: configs/phase1.py:nano.",
    lock_config=True,
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, logs and curves go. Default: runs/RECIPE_SCALE."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, or auto; only with several processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "On a GPU: the same bits from the same command, resumed or not; slower, and attention takes far more memory.",
)


def default_workdir() -> str:
    recipe = str(flags.FLAGS["config"].config_filename).partition(":")[0]
    return os.path.join("runs", f"{pathlib.Path(recipe).stem}_{CONFIG.value.scale}")


def main(_: list[str]) -> None:
    settings.apply(DETERMINISTIC.value)
    # Not at the top: settings come first, and the workers that prepare data import this file and have no use for these.
    from nanollama_jax import curriculum
    from nanollama_jax.train.loop import train

    flags_of_process = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    with one_line_errors(), distributed.joined(*flags_of_process):
        settings.keep_compiled()
        workdir = default_workdir() if WORKDIR.value is None else WORKDIR.value
        if "stages" in CONFIG.value:
            curriculum.run(CONFIG.value, workdir)
        else:
            train(CONFIG.value, workdir)


def exit_alone(argv: list[str]) -> None:
    """One of several processes that fails does not wait for the others to exit."""
    try:
        main(argv)
    except BaseException as error:
        distributed.leave(error)
        raise


if __name__ == "__main__":
    app.run(exit_alone, flags_parser=flags_parser(CONFIG))
