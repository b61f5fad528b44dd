"""Prepare a recipe's corpora: tokenizer, decontamination, tokenised shards.

    nanollama prepare-data --config configs/phase1.py --dry_run
    nanollama prepare-data --config configs/phase1.py:nano
    nanollama prepare-data --config configs/phase1.py \
--config.corpora.fineweb_edu.url='file:///texts/*.jsonl.zst'
    nanollama prepare-data --config configs/sft.py \
--config.tuning.metamath.url='file://chats/*.jsonl'
    nanollama prepare-data --config configs/phase1.py --executor ray

As an array of independent processes, here of Slurm: the first command sets everything up, and the
last one completes what the array did.

    nanollama prepare-data --config configs/phase1.py --num_ranks 100
    sbatch --array=0-99 --mem=4G --wrap='nanollama prepare-data --config configs/phase1.py \
--num_ranks 100 --rank $SLURM_ARRAY_TASK_ID'
    nanollama prepare-data --config configs/phase1.py

For pre-training it trains the tokenizer if there is none, then decontaminates and tokenises every
source. For fine-tuning it adds the chat tokens to the tokenizer and encodes the conversations or
preference pairs. Rerun it to resume: it redoes only what failed or is missing. --executor ray uses
the cluster that RAY_ADDRESS names. nanollama_jax/corpus/sources.py describes source URLs.

What was found of the benchmarks in config.data.benchmarks is listed in each corpus's
contaminated_ids.json, and for conversations and pairs in left_out.txt.
"""

from absl import app, flags
from ml_collections import config_flags

from nanollama_jax import process
from nanollama_jax.command_line import flags_parser
from nanollama_jax.corpus.estimate import print_estimates
from nanollama_jax.corpus.executor import KINDS, Executor
from nanollama_jax.corpus.finetuning import prepare_stage
from nanollama_jax.corpus.prepare import prepare_all
from nanollama_jax.errors import BadInput, one_line_errors

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with an optional scale: configs/phase1.py:nano.", lock_config=True
)
DRY_RUN = flags.DEFINE_boolean(
    "dry_run",
    False,
    "Estimate documents, tokens, disk space and hours from a sample of each source, and stop.",
)
EXECUTOR = flags.DEFINE_enum("executor", "local", KINDS, "Where the work is done.")
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Parallel ranks; 0: one per core, or as many as the cluster has room for."
)
NUM_RANKS = flags.DEFINE_integer(
    "num_ranks", 0, "Share the work among this many processes, such as the tasks of a Slurm array."
)
RANK = flags.DEFINE_integer(
    "rank", None, "With --num_ranks, the index of this process; without it, only set up."
)


def main() -> None:
    process.keep_output_from_failing()
    app.run(prepare, flags_parser=flags_parser(CONFIG, __name__))


def prepare(_: list[str]) -> None:
    with one_line_errors():
        config = CONFIG.value
        if DRY_RUN.value and config.task != "pretrain":
            raise BadInput(
                "--dry_run estimates pre-training corpora: check conversations and pairs with "
                "nanollama check-finetuning-data"
            )
        if DRY_RUN.value:
            print_estimates(config)
            return
        from nanollama_jax.curriculum import stages_of  # imports jax, which an estimate can skip

        stages = stages_of(config).values()
        executor = Executor(EXECUTOR.value, WORKERS.value, NUM_RANKS.value, RANK.value)
        if any(stage.task == "pretrain" for stage in stages):
            prepare_all(config, executor)
        for stage in stages:
            if stage.task != "pretrain" and not executor.num_ranks:
                prepare_stage(stage)
