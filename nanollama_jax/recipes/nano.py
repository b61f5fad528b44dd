"""Nano's own values: what the scale for laptops sets instead of the values of the other scales."""

from nanollama_jax.recipes.corpora import BENCHMARKS

CORPORA = (
    "docs",
    "code",
    "reasoning",
    "transcripts",
)  # all are prepared, however few a stage reads

# Of every stage, by dotted name.
BASE = {
    "model.remat": "none",
    "model.scan_layers": False,  # faster steps, slower compilation: pays off at 4 layers
    "loss.chunk_tokens": 1024,
    "optimizer.peak_lr": 2e-3,
    "schedule.warmup_steps": 50,  # at 20 the gradient norm jumps to 70
    "tokenizer.path": "data/nano/tokenizer.model",
    "tokenizer.training_bytes": 8_000_000,
    "tokenizer.sources": CORPORA,
    "data.dir": "data/nano",
    "data.prepare_tasks": 8,
    "data.validation_fraction": 0.02,
    "data.tuning_validation_fraction": 0.05,
    "validation.every": 100,
    "validation.tokens": 16_384,
    "checkpoint.every": 100,
    "checkpoint.keep_every": 0,
    "gates.perplexity": ((400, 100.0, 1000.0), (500, 100.0, 1000.0)),
    # nano needs no network
    **{f"data.benchmarks.{name}": "" for name in BENCHMARKS},
}

# Of one stage: the arguments of `phase` or `tuning` that differ.
STAGES = {
    "phase1": dict(seq_len=256, shares={"docs": 0.6, "code": 0.3, "reasoning": 0.1}),
    "phase2_8k": dict(seq_len=512, shares={"docs": 0.5, "code": 0.5}),
    "phase2_16k": dict(seq_len=1024, shares={"docs": 0.5, "code": 0.5}),
    "phase3": dict(
        seq_len=256,
        shares={"docs": 0.3, "code": 0.2, "reasoning": 0.3, "transcripts": 0.2},
    ),
    "sft": dict(
        steps=600,
        rows=2,
        seq_len=512,
        peak_lr=1e-3,
        warmup_steps=40,
        shares={"tools": 0.5, "math": 0.5},
        prompts=("What is 12 + 7?",),
        sample_every=600,
    ),
    "dpo": dict(
        steps=40,
        rows=4,
        seq_len=512,
        peak_lr=5e-5,
        warmup_steps=5,
        shares={"right_or_wrong": 1.0},
        prompts=("What is 12 + 7?",),
        sample_every=40,
    ),
    "own": dict(seq_len=256),
}
