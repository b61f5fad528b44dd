"""Phase 1: general text at 4K context for 80 % of all steps. The learning rate warms up, then
stays constant.

    python tools/prepare_data.py --config configs/phase1.py
    python main.py --config configs/phase1.py --workdir runs/1b/phase1

Scales: configs/phase1.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from nanollama_jax.recipes import phase, recipe


def stage(scale: str):
    return phase(
        scale, "phase1", seq_len=4096, theta=(10_000.0, 10_000.0), shares={"fineweb_edu": 1.0}
    )


def get_config(scale: str = "1b"):
    return recipe(scale, [stage(scale)])
