"""Phase 1: general text at 4K context, 80 % of all steps, learning rate warmed up and then stable.

    python tools/prepare_data.py --config configs/phase1.py
    python main.py --config configs/phase1.py --workdir runs/1b/phase1

Scales: configs/phase1.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from configs import common


def stage(scale: str):
    shares = (
        {"docs": 0.6, "code": 0.3, "reasoning": 0.1} if scale == "nano" else {"fineweb_edu": 1.0}
    )
    return common.phase(
        scale,
        0,
        name="phase1",
        seq_len=256 if scale == "nano" else 4096,
        theta=(10_000.0, 10_000.0),
        shares=shares,
    )


def get_config(scale: str = "1b"):
    return common.recipe(scale, [stage(scale)])
