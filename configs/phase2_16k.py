"""Phase 2, second half: the same books and code at 16K context, RoPE theta 500,000.

    python main.py --config configs/phase2_16k.py --workdir runs/1b/phase2_16k --config.init_from=runs/1b/phase2_8k

Scales: configs/phase2_16k.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from configs import common


def stage(scale: str):
    shares = {"docs": 0.5, "code": 0.5} if scale == "nano" else {"pg19": 0.5, "stack_python": 0.5}
    return common.phase(
        scale,
        2,
        name="phase2_16k",
        seq_len=1024 if scale == "nano" else 16_384,
        theta=(500_000.0, 500_000.0),
        shares=shares,
    )


def get_config(scale: str = "1b"):
    return common.recipe(scale, [stage(scale)])
