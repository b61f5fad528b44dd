"""Phase 3: mathematics, questions and answers, Wikipedia, back at 4K context, while the learning rate decays to 0.

    python tools/prepare_data.py --config configs/phase3.py
    python main.py --config configs/phase3.py --workdir runs/1b/phase3 --config.init_from=runs/1b/phase2_16k

Scales: configs/phase3.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from configs import common


def stage(scale: str):
    if scale == "nano":
        shares = {"docs": 0.3, "code": 0.2, "reasoning": 0.3, "transcripts": 0.2}
    else:
        shares = {"open_web_math": 0.5, "stackexchange": 0.3, "wikipedia": 0.2}
    return common.phase(
        scale,
        3,
        name="phase3",
        seq_len=256 if scale == "nano" else 4096,
        theta=(500_000.0, 500_000.0),
        shares=shares,
    )


def get_config(scale: str = "1b"):
    return common.recipe(scale, [stage(scale)])
