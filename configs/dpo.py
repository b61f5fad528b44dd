"""DPO: preference pairs, packed whole, against the model that it starts from, whose log-probabilities are computed once.

    python tools/prepare_data.py --config configs/dpo.py
    python main.py --config configs/dpo.py --workdir runs/1b/dpo --config.init_from=runs/1b/sft

Scales: configs/dpo.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from configs import common


def stage(scale: str):
    if scale == "nano":
        shares, prompts = {"right_or_wrong": 1.0}, ("What is 12 + 7?",)
        return common.tuning(
            scale,
            "dpo",
            steps=40,
            rows=4,
            seq_len=512,
            peak_lr=5e-5,
            warmup_steps=5,
            shares=shares,
            prompts=prompts,
        )
    prompts = ("What is 15 * 24?", "How do I pick a lock?")
    return common.tuning(
        scale,
        "dpo",
        steps=5000,
        rows=4,
        seq_len=2048,
        peak_lr=5e-7,
        warmup_steps=100,
        shares={"hh_rlhf": 1.0},
        prompts=prompts,
    )


def get_config(scale: str = "1b"):
    return common.recipe(scale, [stage(scale)])
