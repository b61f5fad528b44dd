"""What every recipe shares: model sizes, curriculum lengths, optimizer, logging. Sources of the figures: docs/recipe.md.

A phase's file says what is its own: data, context, RoPE theta, steps. `curriculum.py` strings the phases together.
"""

from ml_collections import ConfigDict

from configs.corpora import BENCHMARKS, CORPORA, TUNING
from nanollama_jax.config import defaults
from nanollama_jax.errors import BadInput

# vocab 32,000 everywhere but at nano scale; d_model and ffn_dim are multiples of 256, so that llama.cpp's K-quants apply
MODELS = {
    "nano": dict(
        vocab_size=4096,
        num_layers=4,
        d_model=256,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=768,
    ),
    "60m": dict(
        vocab_size=32000,
        num_layers=12,
        d_model=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        ffn_dim=1536,
    ),
    "300m": dict(
        vocab_size=32000,
        num_layers=20,
        d_model=1024,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        ffn_dim=2816,
    ),
    "1b": dict(
        vocab_size=32000,
        num_layers=22,
        d_model=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        ffn_dim=5632,
    ),
}

# Global steps at which phase1, phase2_8k, phase2_16k and phase3 end. Nano keeps the proportions.
PHASE_ENDS = {
    "nano": (400, 422, 450, 500),
    "60m": (18_400, 19_400, 20_700, 23_000),
    "300m": (92_000, 97_000, 103_500, 115_000),
}
PHASE_ENDS["1b"] = (184_000, 194_000, 207_000, 230_000)
TOKENS_PER_STEP = {"nano": 2048, "60m": 131_072, "300m": 131_072, "1b": 131_072}
NANO_CORPORA = ("docs", "code", "reasoning", "transcripts")


def check_scale(scale: str) -> None:
    """Raises BadInput for a scale that there is not."""
    if scale not in MODELS:
        raise BadInput(f"unknown scale {scale!r}: choose one of {', '.join(MODELS)}")


def base(scale: str) -> ConfigDict:
    """What all phases share: the defaults of nanollama_jax/config.py, and what a scale sets instead."""
    check_scale(scale)
    nano = scale == "nano"
    config = defaults()
    config.scale = scale
    config.model.update(MODELS[scale])
    config.schedule.update(dict(decay_start=PHASE_ENDS[scale][2], total_steps=PHASE_ENDS[scale][3]))
    config.tokenizer.vocab_size = config.model.get_ref("vocab_size")
    config.corpora = ConfigDict()  # what this recipe prepares: configs/corpora.py
    config.tuning = ConfigDict()  # conversations and pairs to fine-tune on: configs/corpora.py
    config.data.benchmarks = ConfigDict(BENCHMARKS)  # kept out of all of them
    config.data.sources = ConfigDict()
    config.wandb.project = f"nanollama-{scale}"

    # Go/no-go gates (the user's plan): at a global step, validation perplexity below `go` goes on, above `stop` stops.
    if scale == "1b":
        config.gates.perplexity = (
            (50_000, 25.0, 30.0),
            (100_000, 18.0, 22.0),
            (150_000, 15.0, 17.0),
            (184_000, 13.0, 15.0),
            (230_000, 12.0, 13.0),
        )
    if nano:
        config.model.remat = "none"
        config.model.scan_layers = (
            False  # compiles slower, runs faster: worth it for 4 layers, not for 22
        )
        config.loss.chunk_tokens = 1024
        config.optimizer.peak_lr = 2e-3
        config.schedule.warmup_steps = 50  # with 20 the gradient norm jumps to 70
        config.tokenizer.path, config.data.dir = "data/nano/tokenizer.model", "data/nano"
        config.tokenizer.update(dict(training_bytes=8_000_000, sources=NANO_CORPORA))
        config.data.update(
            dict(prepare_tasks=8, validation_fraction=0.02, tuning_validation_fraction=0.05)
        )
        config.data.benchmarks = ConfigDict(dict.fromkeys(BENCHMARKS, ""))  # nano needs no network
        config.validation.update(dict(every=100, tokens=16_384))
        config.checkpoint.update(dict(every=100, keep_every=0))
        config.gates.perplexity = ((400, 100.0, 1000.0), (500, 100.0, 1000.0))
    return config


def phase(
    scale: str,
    number: int,
    *,
    name: str,
    seq_len: int,
    theta: tuple[float, float],
    shares: dict[str, float],
) -> ConfigDict:
    """What is a phase's own: `number` counts from 0; `theta` is RoPE theta at its start and end; `shares` is corpus -> share of the rows."""
    check_scale(scale)
    stage = ConfigDict()
    stage.name = name
    stage.start_step = (0, *PHASE_ENDS[scale])[number]
    stage.end_step = PHASE_ENDS[scale][number]
    stage.tokens_per_step = TOKENS_PER_STEP[scale]
    stage.seq_len = seq_len
    stage.batch_size = stage.tokens_per_step // seq_len  # rows, over all devices and micro-batches
    stage.accumulation = 1  # micro-batches per step; 1: 65,536 tokens at a time on each of two 80 GB GPUs. On one of them: 2
    stage.rope = ConfigDict(dict(start_theta=theta[0], end_theta=theta[1]))
    stage.data = ConfigDict(dict(sources=shares))
    return stage


def tuning(
    scale: str,
    task: str,
    *,
    steps: int,
    rows: int,
    seq_len: int,
    peak_lr: float,
    warmup_steps: int,
    shares: dict[str, float],
    prompts: tuple[str, ...],
) -> ConfigDict:
    """What is a fine-tuning stage's own: its steps count from 0, the learning rate goes up over `warmup_steps` and down to 0."""
    check_scale(scale)
    nano = scale == "nano"
    vocab_size = MODELS[scale]["vocab_size"] + 8
    stage = ConfigDict(
        dict(
            name=task,
            task=task,
            start_step=0,
            end_step=steps,
            seq_len=seq_len,
            batch_size=rows,
            accumulation=1,
        )
    )
    stage.tokens_per_step = rows * seq_len
    stage.model = ConfigDict(dict(vocab_size=vocab_size, packed_documents=32))
    stage.tokenizer = ConfigDict(dict(vocab_size=vocab_size))
    stage.tokenizer.base = "data/nano/tokenizer.model" if nano else "data/tokenizer.model"
    stage.tokenizer.path = stage.tokenizer.base.replace(".model", "_chat.model")
    stage.rope = ConfigDict(dict(start_theta=500_000.0, end_theta=500_000.0))
    stage.loss = ConfigDict(dict(z_loss=0.0))
    stage.optimizer = ConfigDict(dict(peak_lr=peak_lr))
    stage.schedule = ConfigDict(
        dict(warmup_steps=warmup_steps, decay_start=warmup_steps, total_steps=steps)
    )
    stage.data = ConfigDict(dict(sources=shares, validation=(), max_segments=32))
    stage.gates = ConfigDict(dict(perplexity=()))
    stage.samples = ConfigDict(dict(every=steps if nano else 500, prompts=prompts))
    return stage


def recipe(scale: str, stages: list[ConfigDict]) -> ConfigDict:
    """A single stage's config, or that of several in order (`config.stages`), with the corpora that they read."""
    config = base(scale)
    names = dict.fromkeys(
        name for stage in stages if "task" not in stage for name in stage.data.sources
    )
    if scale == "nano" and names:
        names = dict.fromkeys(
            NANO_CORPORA
        )  # small enough to always have all, and the tokenizer is trained on them
    with config.unlocked():
        part = PHASE_ENDS[scale][-1] / PHASE_ENDS["1b"][-1]  # of the budgets, which are those of 1b
        config.corpora = ConfigDict(
            {
                name: CORPORA[name] | {"max_tokens": int(CORPORA[name]["max_tokens"] * part)}
                for name in names
            }
        )
        config.tuning = ConfigDict(
            {
                name: TUNING[name]
                for stage in stages
                if "task" in stage
                for name in stage.data.sources
            }
        )
        if len(stages) == 1:
            config.update(stages[0])
        else:
            config.stages = ConfigDict({stage.name: stage for stage in stages})
            config.data.validation = tuple(names)  # all along, to show what a later phase forgets
    return config
