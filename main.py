"""Trains: one phase, or a whole curriculum. The config file says what; everything in it can be overridden on the command line.

python main.py --config configs/curriculum.py:nano                                   all four phases, minutes on a laptop CPU
python main.py --config configs/phase1.py --workdir runs/1b/phase1                   one phase of the 1B model
python main.py --config configs/phase1.py:nano --config.optimizer.peak_lr=1e-3       any value of the config, by its name

The same command resumes. With several hosts, run it on each with --coordinator=HOST:PORT --num_processes=N --process_id=I (--coordinator=auto
under Slurm or Open MPI). SIGTERM and Ctrl-C save a checkpoint, then exit 0.
"""

import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the default, 0.75, wastes 14 GB of an H100
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from nanollama_jax.errors import BadInput, one_line_errors

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, with an optional scale after a colon: configs/phase1.py:nano.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and curves go. Default: runs/RECIPE_SCALE.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto; only with several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def default_workdir() -> str:
    recipe = str(flags.FLAGS["config"].config_filename).partition(":")[0]
    return os.path.join("runs", f"{pathlib.Path(recipe).stem}_{CONFIG.value.scale}")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax and jax narrate
    # Not at the top: the workers that prepare data import this file, and have no use for these.
    import jax

    from nanollama_jax import curriculum
    from nanollama_jax.train.loop import train

    with one_line_errors():
        if len(argv) > 1:
            raise BadInput(f"unexpected argument {argv[1]!r}: overrides are written --config.NAME=VALUE")
        if CONFIG.value is None:
            raise BadInput("no --config: try --config configs/curriculum.py:nano")
        if COORDINATOR.value == "auto":
            jax.distributed.initialize()
        elif COORDINATOR.value:
            jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        workdir = WORKDIR.value or default_workdir()
        if "stages" in CONFIG.value:
            curriculum.run(CONFIG.value, workdir)
        else:
            train(CONFIG.value, workdir)


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but a mistake on the command line ends in one line."""
    with one_line_errors():
        try:
            rest = flags.FLAGS(argv)
            str(CONFIG.value)  # a recipe that does not load says so only when it is looked at
            return rest
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise BadInput(f"command line: {error}") from None


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags, argv=sys.argv)
