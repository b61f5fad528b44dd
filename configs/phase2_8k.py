"""Phase 2, first half: books and code at 8K context; RoPE theta ramps from 10,000 to 500,000 over the stage.

    python tools/prepare_data.py --config configs/phase2_8k.py
    python main.py --config configs/phase2_8k.py --workdir runs/1b/phase2_8k --config.init_from=runs/1b/phase1

Scales: configs/phase2_8k.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from configs import common


def stage(scale: str):
    shares = {"docs": 0.5, "code": 0.5} if scale == "nano" else {"pg19": 0.5, "stack_python": 0.5}
    return common.phase(
        scale,
        1,
        name="phase2_8k",
        seq_len=512 if scale == "nano" else 8192,
        theta=(10_000.0, 500_000.0),
        shares=shares,
    )


def get_config(scale: str = "1b"):
    return common.recipe(scale, [stage(scale)])
