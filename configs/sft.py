"""SFT: conversations with thoughts and tool calls, packed whole, loss on what the assistant says; the vocabulary grows by the chat tokens.

    python tools/prepare_data.py --config configs/sft.py
    python main.py --config configs/sft.py --workdir runs/1b/sft --config.init_from=runs/1b/phase3

Scales: configs/sft.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs). One's own conversations in place of a source:
--config.tuning.metamath.url='file://chats/*.jsonl'; tools/check_finetuning_data.py checks them.
"""

from configs import common


def stage(scale: str):
    if scale == "nano":
        shares, prompts = {"tools": 0.5, "math": 0.5}, ("What is 12 + 7?",)
        return common.tuning(
            scale,
            "sft",
            steps=600,
            rows=2,
            seq_len=512,
            peak_lr=1e-3,
            warmup_steps=40,
            shares=shares,
            prompts=prompts,
        )
    shares = {"oasst2": 0.5, "metamath": 0.25, "hermes": 0.25}
    prompts = ("What is 15 * 24?", "Write a short poem about the sea.", "Why is the sky blue?")
    return common.tuning(
        scale,
        "sft",
        steps=12_000,
        rows=8,
        seq_len=2048,
        peak_lr=1e-5,
        warmup_steps=100,
        shares=shares,
        prompts=prompts,
    )


def get_config(scale: str = "1b"):
    return common.recipe(scale, [stage(scale)])
