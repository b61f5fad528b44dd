"""What every recipe shares: model sizes, curriculum lengths, optimizer, logging. Sources of the figures: docs/recipe.md.

A phase's file says what is its own: data, context, RoPE theta, steps. `curriculum.py` strings the phases together.
"""

from ml_collections import ConfigDict

from configs.corpora import BENCHMARKS, CORPORA, TUNING

# vocab 32,000 everywhere but at nano scale; d_model and ffn_dim are multiples of 256, so that llama.cpp's K-quants apply
MODELS = {
    "nano": dict(vocab_size=4096, num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, head_dim=32, ffn_dim=768),
    "60m": dict(vocab_size=32000, num_layers=12, d_model=512, num_heads=8, num_kv_heads=2, head_dim=64, ffn_dim=1536),
    "300m": dict(vocab_size=32000, num_layers=20, d_model=1024, num_heads=16, num_kv_heads=4, head_dim=64, ffn_dim=2816),
    "1b": dict(vocab_size=32000, num_layers=22, d_model=2048, num_heads=32, num_kv_heads=4, head_dim=64, ffn_dim=5632),
}

# Global steps at which phase1, phase2_8k, phase2_16k and phase3 end. Nano keeps the proportions.
PHASE_ENDS = {"nano": (400, 422, 450, 500), "60m": (18_400, 19_400, 20_700, 23_000), "300m": (92_000, 97_000, 103_500, 115_000)}
PHASE_ENDS["1b"] = (184_000, 194_000, 207_000, 230_000)
TOKENS_PER_STEP = {"nano": 2048, "60m": 131_072, "300m": 131_072, "1b": 131_072}
NANO_CORPORA = ("docs", "code", "reasoning", "transcripts")


def base(scale: str) -> ConfigDict:
    """All that does not differ between phases."""
    if scale not in MODELS:
        raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(MODELS)}")
    nano = scale == "nano"
    config = ConfigDict()
    config.scale = scale
    config.task = "pretrain"  # or sft, dpo
    config.seed = 0
    config.init_from = ""  # a workdir whose latest checkpoint (params, optimizer, step; sft, dpo: params alone) to start from

    config.model = ConfigDict(MODELS[scale])
    config.model.norm_eps = 1e-5
    config.model.dtype = "auto"  # bfloat16 on GPU, float32 on CPU
    config.model.attention = "auto"  # docs/recipe.md says what it picks
    config.model.document_mask = True
    config.model.packed_documents = 8  # room in cudnn_packed for so many documents a row, on average over a device's rows
    config.model.remat = "none" if nano else "auto"  # auto: the fastest that fits the device (model/config.py lists them)
    config.model.scan_layers = not nano  # unrolled compiles slower and runs faster: worth it for 4 layers, not for 22

    config.mesh = ConfigDict(dict(data=1, fsdp=-1))  # -1: all devices

    config.loss = ConfigDict(dict(z_loss=1e-4, chunk_tokens=1024 if nano else 8192))
    config.optimizer = ConfigDict(dict(peak_lr=6e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0))
    config.schedule = ConfigDict(dict(warmup_steps=2000, decay_start=PHASE_ENDS[scale][2], total_steps=PHASE_ENDS[scale][3]))
    config.rope = ConfigDict(dict(schedule="ramp", start_theta=10_000.0, end_theta=10_000.0))

    config.tokenizer = ConfigDict(dict(path="data/nano/tokenizer.model" if nano else "data/tokenizer.model"))
    config.tokenizer.vocab_size = config.model.get_ref("vocab_size")
    config.tokenizer.base = ""  # sft, dpo: the model that `path` extends with the chat tokens
    config.tokenizer.training_bytes = 8_000_000 if nano else 1_000_000_000
    config.tokenizer.sources = NANO_CORPORA if nano else ("fineweb_edu",)  # what it is trained on

    config.corpora = ConfigDict()  # what this recipe prepares: configs/corpora.py
    config.tuning = ConfigDict()  # conversations and pairs to fine-tune on: configs/corpora.py
    config.data = ConfigDict(dict(dir="data/nano" if nano else "data", prepare_tasks=8 if nano else 256))
    config.data.validation_fraction = 0.02 if nano else 0.0005
    config.data.benchmarks = ConfigDict(dict.fromkeys(BENCHMARKS, "") if nano else BENCHMARKS)  # kept out; nano, which needs no network, has no URLs
    config.data.max_segments = 64
    config.data.tuning_validation_fraction = 0.05 if nano else 0.01  # of conversations and pairs
    config.data.sources = ConfigDict()  # name -> share of the rows
    config.data.validation = ()  # corpora to measure perplexity on; empty: those in data.sources

    # of dpo, which takes no z_loss
    config.preference = ConfigDict(dict(beta=0.1, label_smoothing=0.0, length_normalised=False))
    config.samples = ConfigDict(dict(every=0, prompts=(), max_new_tokens=200))  # sft, dpo: greedy replies in the log

    config.log_every = 10
    config.validation = ConfigDict(dict(every=100 if nano else 2000, tokens=16_384 if nano else 2_097_152))  # tokens per source
    config.checkpoint = ConfigDict(dict(every=100 if nano else 1000, keep_last=2, keep_every=0 if nano else 10_000))
    config.wandb = ConfigDict(dict(mode="disabled", project=f"nanollama-{scale}"))  # online, offline or disabled

    # Go/no-go gates (the user's plan): at a global step, validation perplexity below `go` goes on, above `stop` stops.
    config.gates = ConfigDict(dict(enforce=True, perplexity=()))
    if scale == "1b":
        config.gates.perplexity = (
            (50_000, 25.0, 30.0),
            (100_000, 18.0, 22.0),
            (150_000, 15.0, 17.0),
            (184_000, 13.0, 15.0),
            (230_000, 12.0, 13.0),
        )
    if nano:
        config.optimizer.peak_lr = 2e-3
        config.schedule.warmup_steps = 50  # with 20 the gradient norm jumps to 70
        config.gates.perplexity = ((400, 100.0, 1000.0), (500, 100.0, 1000.0))
    return config


def phase(scale: str, number: int, *, name: str, seq_len: int, theta: tuple[float, float], shares: dict[str, float]) -> ConfigDict:
    """What is a phase's own: `number` counts from 0; `theta` is RoPE theta at its start and end; `shares` is corpus -> share of the rows."""
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
    scale: str, task: str, *,
    steps: int, rows: int, seq_len: int, peak_lr: float, warmup_steps: int, shares: dict[str, float], prompts: tuple[str, ...],
) -> ConfigDict:  # fmt: skip
    """What is a fine-tuning stage's own: its steps count from 0, the learning rate goes up over `warmup_steps` and down to 0."""
    nano = scale == "nano"
    vocab_size = MODELS[scale]["vocab_size"] + 8
    stage = ConfigDict(dict(name=task, task=task, start_step=0, end_step=steps, seq_len=seq_len, batch_size=rows, accumulation=1))
    stage.tokens_per_step = rows * seq_len
    stage.model = ConfigDict(dict(vocab_size=vocab_size, packed_documents=32))
    stage.tokenizer = ConfigDict(dict(vocab_size=vocab_size))
    stage.tokenizer.base = "data/nano/tokenizer.model" if nano else "data/tokenizer.model"
    stage.tokenizer.path = stage.tokenizer.base.replace(".model", "_chat.model")
    stage.rope = ConfigDict(dict(start_theta=500_000.0, end_theta=500_000.0))
    stage.loss = ConfigDict(dict(z_loss=0.0))
    stage.optimizer = ConfigDict(dict(peak_lr=peak_lr))
    stage.schedule = ConfigDict(dict(warmup_steps=warmup_steps, decay_start=warmup_steps, total_steps=steps))
    stage.data = ConfigDict(dict(sources=shares, validation=(), max_segments=32))
    stage.gates = ConfigDict(dict(perplexity=()))
    stage.samples = ConfigDict(dict(every=steps if nano else 500, prompts=prompts))
    return stage


def recipe(scale: str, stages: list[ConfigDict]) -> ConfigDict:
    """A single stage's config, or that of several in order (`config.stages`), with the corpora that they read."""
    config = base(scale)
    names = dict.fromkeys(name for stage in stages if "task" not in stage for name in stage.data.sources)
    if scale == "nano" and names:
        names = dict.fromkeys(NANO_CORPORA)  # small enough to always have all, and the tokenizer is trained on them
    with config.unlocked():
        part = PHASE_ENDS[scale][-1] / PHASE_ENDS["1b"][-1]  # of the budgets, which are those of 1b
        config.corpora = ConfigDict({name: CORPORA[name] | {"max_tokens": int(CORPORA[name]["max_tokens"] * part)} for name in names})
        config.tuning = ConfigDict({name: TUNING[name] for stage in stages if "task" in stage for name in stage.data.sources})
        if len(stages) == 1:
            config.update(stages[0])
        else:
            config.stages = ConfigDict({stage.name: stage for stage in stages})
            config.data.validation = tuple(names)  # all along, to show what a later phase forgets
    return config
