"""Prepare a recipe's corpora: tokenizer, decontamination, tokenised shards.

    nanollama prepare-data --config configs/phase1.py --dry_run
    nanollama prepare-data --config configs/phase1.py:nano
    nanollama prepare-data --config configs/phase1.py \
--config.corpora.fineweb_edu.url='file:///texts/*.jsonl.zst'
    nanollama prepare-data --config configs/sft.py \
--config.tuning.metamath.url='file://chats/*.jsonl'
    nanollama prepare-data --config configs/phase1.py --executor slurm --partition cpu
    nanollama prepare-data --config configs/phase1.py --executor ray

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
PARTITION = flags.DEFINE_string("partition", "", "Slurm: the partition.")
TIME = flags.DEFINE_string("time", "24:00:00", "Slurm: time limit of a rank.")
MEMORY_GB = flags.DEFINE_integer("memory_gb", 4, "Slurm: memory of a rank, which has one core.")


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
        if any(stage.task == "pretrain" for stage in stages):
            executor = Executor(
                EXECUTOR.value, WORKERS.value, PARTITION.value, TIME.value, MEMORY_GB.value
            )
            prepare_all(config, executor)
        for stage in stages:
            if stage.task != "pretrain":
                prepare_stage(stage)
