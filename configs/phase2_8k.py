"""Phase 2, first half: books and code at 8K context. RoPE theta ramps from 10,000 to 500,000.

    python tools/prepare_data.py --config configs/phase2_8k.py
    python main.py --config configs/phase2_8k.py --workdir runs/1b/phase2_8k \\
        --config.init_from=runs/1b/phase1

Scales: configs/phase2_8k.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from nanollama_jax.recipes import phase, recipe


def stage(scale: str):
    return phase(
        scale,
        "phase2_8k",
        seq_len=8192,
        theta=(10_000.0, 500_000.0),
        shares={"pg19": 0.5, "stack_python": 0.5},
    )


def get_config(scale: str = "1b"):
    return recipe(scale, [stage(scale)])
