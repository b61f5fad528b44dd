"""Trains one stage, a whole curriculum, or your own text, as a recipe says.

python main.py --config configs/curriculum.py:nano                   all stages, minutes on a CPU
python main.py --config configs/own.py:nano --config.text='texts/**/*.txt'             your text
python main.py --config configs/phase1.py --workdir runs/1b/phase1     a phase of the 1B model
python main.py --config configs/phase1.py:nano --config.optimizer.peak_lr=1e-3      any value
python main.py --config configs/phase1.py:nano --print_config              what would run

Rerun the command to resume. With several hosts, run it on each with --coordinator=HOST:PORT
--num_processes=N --process_id=I (--coordinator=auto under Slurm or Open MPI). SIGTERM, SIGHUP,
SIGUSR1, SIGQUIT or Ctrl-C during training save a checkpoint and exit 0; a second Ctrl-C exits at
once.
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
    "workdir", None, "Folder for checkpoints, logs and curves. Default: runs/RECIPE_SCALE."
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print the config as it would run on this machine, and exit."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, or auto; only with several processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "On a GPU: bit-identical results from the same command, resumed or not. Slower, and attention "
    "takes far more memory.",
)


def default_workdir() -> str:
    from nanollama_jax import own

    if "text" in CONFIG.value:
        return own.default_workdir(CONFIG.value)
    recipe = str(flags.FLAGS["config"].config_filename).partition(":")[0]
    return os.path.join("runs", f"{pathlib.Path(recipe).stem}_{CONFIG.value.scale}")


def print_config() -> None:
    from nanollama_jax.config.show import lines
    from nanollama_jax.console import console
    from nanollama_jax.curriculum import stages_of
    from nanollama_jax.train.settle import resolve

    stages = {} if "text" in CONFIG.value else stages_of(CONFIG.value)
    for line in lines(CONFIG.value, {name: resolve(stage) for name, stage in stages.items()}):
        console.print(line)


def main(_: list[str]) -> None:
    settings.apply(DETERMINISTIC.value)
    with one_line_errors():
        if PRINT_CONFIG.value:
            print_config()
            return
        # Settings come first; and the workers that prepare data import this file without these
        from nanollama_jax import curriculum, own
        from nanollama_jax.train.loop import train

        with distributed.joined(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value):
            settings.keep_compiled()
            workdir = default_workdir() if WORKDIR.value is None else WORKDIR.value
            if "text" in CONFIG.value:
                own.run(CONFIG.value, workdir)
            elif "stages" in CONFIG.value:
                curriculum.run(CONFIG.value, workdir)
            else:
                train(CONFIG.value, workdir)


def exit_alone(argv: list[str]) -> None:
    """Of several processes, one that fails does not wait for the others to exit."""
    try:
        main(argv)
    except BaseException as error:
        distributed.leave(error)
        raise


if __name__ == "__main__":
    app.run(exit_alone, flags_parser=flags_parser(CONFIG))
