"""Phase 2, second half: the same books and code at 16K context, RoPE theta 500,000.

    python main.py --config configs/phase2_16k.py --workdir runs/1b/phase2_16k \\
        --config.init_from=runs/1b/phase2_8k

Scales: configs/phase2_16k.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from nanollama_jax.recipes import phase, recipe


def stage(scale: str):
    return phase(
        scale,
        "phase2_16k",
        seq_len=16_384,
        theta=(500_000.0, 500_000.0),
        shares={"pg19": 0.5, "stack_python": 0.5},
    )


def get_config(scale: str = "1b"):
    return recipe(scale, [stage(scale)])
