"""Prepares a recipe's corpora: trains the tokenizer if there is none; decontaminates and tokenises every source into shards. Of a recipe to fine-tune
by: extends the tokenizer with the chat tokens and encodes the conversations or preference pairs.

    python tools/prepare_data.py --config configs/phase1.py --dry_run         what it will take: documents, tokens, disk, hours
    python tools/prepare_data.py --config configs/phase1.py:nano
    python tools/prepare_data.py --config configs/phase1.py --config.corpora.fineweb_edu.url='file:///texts/*.jsonl.zst'
    python tools/prepare_data.py --config configs/sft.py --config.tuning.metamath.url='file://chats/*.jsonl'
    python tools/prepare_data.py --config configs/phase1.py --executor ray    on the cluster that RAY_ADDRESS names

As an array of independent processes, here of Slurm; the first command sets everything up, the last one completes what the array did:

    python tools/prepare_data.py --config configs/phase1.py --num_ranks 100
    sbatch --array=0-99 --mem=4G --wrap='python tools/prepare_data.py --config configs/phase1.py --num_ranks 100 --rank $SLURM_ARRAY_TASK_ID'
    python tools/prepare_data.py --config configs/phase1.py

Run again, it goes on where it was stopped, does only what failed, and nothing where there is nothing left to do. What was found of the benchmarks in
config.data.benchmarks stands in each corpus's contaminated_ids.json, and for conversations and pairs in left_out.txt. Source URLs:
nanollama_jax/corpus/sources.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import app, flags
from ml_collections import config_flags

from nanollama_jax import process
from nanollama_jax.corpus.estimate import print_estimates
from nanollama_jax.corpus.executor import KINDS, Executor
from nanollama_jax.corpus.finetuning import prepare_stage
from nanollama_jax.corpus.prepare import prepare_all
from nanollama_jax.errors import BadInput, flags_parser, one_line_errors

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, as in configs/phase1.py:nano.", lock_config=True
)
DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Read a sample of each source, print what preparing it will take, and stop."
)
EXECUTOR = flags.DEFINE_enum("executor", "local", KINDS, "Where the work is done.")
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Ranks at a time; 0: one on each core, or as many as the cluster has room for."
)
NUM_RANKS = flags.DEFINE_integer(
    "num_ranks", 0, "Share the work among this many processes, such as the tasks of a Slurm array."
)
RANK = flags.DEFINE_integer(
    "rank", None, "With --num_ranks, which of the processes this is; without it, only set up."
)


def main(_: list[str]) -> None:
    with one_line_errors():
        if DRY_RUN.value and CONFIG.value.task != "pretrain":
            raise BadInput(
                "--dry_run estimates pre-training's corpora: tools/check_finetuning_data.py reads conversations and pairs"
            )
        if DRY_RUN.value:
            print_estimates(CONFIG.value)
            return
        from nanollama_jax.curriculum import (
            stages_of,
        )  # not at the top: workers import this file, and have no use for jax

        config = CONFIG.value
        stages = stages_of(config).values()
        executor = Executor(EXECUTOR.value, WORKERS.value, NUM_RANKS.value, RANK.value)
        if any(stage.task == "pretrain" for stage in stages):
            prepare_all(config, executor)
        for stage in stages:
            if stage.task != "pretrain" and not executor.num_ranks:
                prepare_stage(stage)


if __name__ == "__main__":
    process.keep_output_from_failing()
    app.run(main, flags_parser=flags_parser(CONFIG))
