"""SFT: conversations with thoughts and tool calls, packed whole. The loss is on what the assistant
writes. The vocabulary grows by the chat tokens.

    python tools/prepare_data.py --config configs/sft.py
    python main.py --config configs/sft.py --workdir runs/1b/sft --config.init_from=runs/1b/phase3

To use your conversations in place of a source: --config.tuning.metamath.url='file://chats/*.jsonl';
tools/check_finetuning_data.py checks them.

Scales: configs/sft.py:nano, :60m, :300m, :1b (the default; two 80 GB GPUs).
"""

from nanollama_jax.recipes import recipe, tuning


def stage(scale: str):
    return tuning(
        scale,
        "sft",
        steps=12_000,
        rows=8,
        seq_len=2048,
        peak_lr=1e-5,
        shares={"oasst2": 0.5, "metamath": 0.25, "hermes": 0.25},
        prompts=("What is 15 * 24?", "Write a short poem about the sea.", "Why is the sky blue?"),
    )


def get_config(scale: str = "1b"):
    return recipe(scale, [stage(scale)])
