"""The whole curriculum in one command: tokenizer, data, four phases of pre-training, SFT and DPO,
each from where the last one ended.

    python main.py --config configs/curriculum.py:nano                     minutes on a laptop CPU
    python main.py --config configs/curriculum.py:1b --workdir runs/1b     two 80 GB GPUs

Rerun the command to resume; finished stages are skipped. Override a value that all stages share as
--config.optimizer.peak_lr=1e-3, and a value of one stage as --config.stages.phase1.batch_size=16.
"""

from configs import dpo, phase1, phase2_8k, phase2_16k, phase3, sft
from nanollama_jax.recipes import recipe


def get_config(scale: str = "nano"):
    stages = [each.stage(scale) for each in (phase1, phase2_8k, phase2_16k, phase3, sft, dpo)]
    return recipe(scale, stages)
