"""Phase 3: mathematics, questions and answers, and Wikipedia, back at 4K context. The learning
rate decays to 0.

    python tools/prepare_data.py --config configs/phase3.py
    python main.py --config configs/phase3.py --workdir runs/1b/phase3 \\
        --config.init_from=runs/1b/phase2_16k

Scales: configs/phase3.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from nanollama_jax.recipes import phase, recipe


def stage(scale: str):
    return phase(
        scale,
        "phase3",
        seq_len=4096,
        theta=(500_000.0, 500_000.0),
        shares={"open_web_math": 0.5, "stackexchange": 0.3, "wikipedia": 0.2},
    )


def get_config(scale: str = "1b"):
    return recipe(scale, [stage(scale)])
