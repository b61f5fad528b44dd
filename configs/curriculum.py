"""The whole curriculum in one command: tokenizer, data, the four phases of pre-training, SFT and DPO, each from where the last one ended.

    python main.py --config configs/curriculum.py:nano                       the quickstart: minutes on a laptop CPU
    python main.py --config configs/curriculum.py:1b --workdir runs/1b       two 80 GB GPUs

Run it again to resume; what is finished is skipped. What all phases share is overridden as `--config.optimizer.peak_lr=1e-3`, what is a
phase's own as `--config.stages.phase1.batch_size=16`.
"""

from configs import common, dpo, phase1, phase2_8k, phase2_16k, phase3, sft


def get_config(scale: str = "nano"):
    return common.recipe(
        scale, [each.stage(scale) for each in (phase1, phase2_8k, phase2_16k, phase3, sft, dpo)]
    )
