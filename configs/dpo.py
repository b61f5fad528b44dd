"""DPO: preference pairs, packed whole. The reference is the model that the run starts from; its
log-probabilities are computed once.

    python tools/prepare_data.py --config configs/dpo.py
    python main.py --config configs/dpo.py --workdir runs/1b/dpo --config.init_from=runs/1b/sft

Scales: configs/dpo.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from nanollama_jax.recipes import recipe, tuning


def stage(scale: str):
    return tuning(
        scale,
        "dpo",
        steps=5000,
        rows=4,
        seq_len=2048,
        peak_lr=5e-7,
        shares={"hh_rlhf": 1.0},
        prompts=("What is 15 * 24?", "How do I pick a lock?"),
    )


def get_config(scale: str = "1b"):
    return recipe(scale, [stage(scale)])
