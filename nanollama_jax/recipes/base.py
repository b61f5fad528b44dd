"""Builds the configs of recipes: a stage's own values, on top of what all stages of a scale share.

The figures and their sources: docs/recipe.md. Every setting: nanollama_jax/config/settings.py.
"""

from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.config import defaults
from nanollama_jax.errors import BadInput
from nanollama_jax.recipes import nano
from nanollama_jax.recipes.corpora import BENCHMARKS, CORPORA, TUNING, corpus
from nanollama_jax.recipes.sizes import MODELS, PHASE_ENDS, PHASES, TOKENS_PER_STEP

# Go/no-go gates of the 1B curriculum: at a step, validation perplexity below the first figure
# passes, above the second it stops the run.
GATES_1B = (
    (50_000, 25.0, 30.0),
    (100_000, 18.0, 22.0),
    (150_000, 15.0, 17.0),
    (184_000, 13.0, 15.0),
    (230_000, 12.0, 13.0),
)


def check_scale(scale: str) -> None:
    """Raises BadInput for an unknown scale."""
    if scale not in MODELS:
        raise BadInput(f"unknown scale {scale!r}: choose one of {', '.join(MODELS)}")


def base(scale: str) -> ConfigDict:
    """What all stages share: the defaults of every setting, and the values of a scale."""
    check_scale(scale)
    config = defaults()
    config.scale = scale
    config.model.update(MODELS[scale])
    config.schedule.update(dict(decay_start=PHASE_ENDS[scale][2], total_steps=PHASE_ENDS[scale][3]))
    config.tokenizer.vocab_size = config.model.get_ref("vocab_size")
    config.corpora = ConfigDict()  # text that this recipe prepares
    config.tuning = ConfigDict()  # conversations and pairs that it fine-tunes on
    config.data.benchmarks = ConfigDict(BENCHMARKS)  # kept out of all of them
    config.data.sources = ConfigDict()
    config.wandb.project = f"nanollama-{scale}"
    if scale == "1b":
        config.gates.perplexity = GATES_1B
    if scale == "nano":
        config.update_from_flattened_dict(nano.BASE)
    return config


def phase(
    scale: str,
    name: str,
    *,
    seq_len: int,
    theta: tuple[float, float],
    shares: dict[str, float],
) -> ConfigDict:
    """A phase of pre-training: the values that differ from those of the other phases.

    Args:
      name: one of `sizes.PHASES`, which says at which steps the phase starts and ends.
      theta: RoPE theta at the phase's first and last step.
      shares: corpus -> share of the rows.
    """
    check_scale(scale)
    number = PHASES.index(name)
    own = dict(seq_len=seq_len, shares=shares)
    if scale == "nano":
        own |= nano.STAGES[name]
    return _stage(
        dict(
            name=name,
            start_step=(0, *PHASE_ENDS[scale])[number],
            end_step=PHASE_ENDS[scale][number],
            seq_len=own["seq_len"],
            batch_size=TOKENS_PER_STEP[scale] // own["seq_len"],
            rope=dict(start_theta=theta[0], end_theta=theta[1]),
            data=dict(sources=own["shares"]),
        )
    )


def tuning(
    scale: str,
    task: str,
    *,
    steps: int,
    rows: int,
    seq_len: int,
    peak_lr: float,
    shares: dict[str, float],
    prompts: tuple[str, ...],
    warmup_steps: int = 100,
    sample_every: int = 500,
) -> ConfigDict:
    """A fine-tuning stage, sft or dpo. Its steps count from 0; the learning rate falls to 0 from
    the end of the warm-up. `rows` is the batch size; replies to `prompts` are sampled as it trains."""
    check_scale(scale)
    own = dict(steps=steps, rows=rows, seq_len=seq_len, peak_lr=peak_lr, shares=shares)
    own |= dict(prompts=prompts, warmup_steps=warmup_steps, sample_every=sample_every)
    if scale == "nano":
        own |= nano.STAGES[task]
    tokenizer = base(scale).tokenizer.path
    vocab_size = MODELS[scale]["vocab_size"] + 8  # 6 chat tokens, padded to a multiple of 8
    warmup_steps = own["warmup_steps"]
    return _stage(
        dict(
            name=task,
            task=task,
            start_step=0,
            end_step=own["steps"],
            seq_len=own["seq_len"],
            batch_size=own["rows"],
            model=dict(vocab_size=vocab_size, packed_documents=32),
            tokenizer=dict(
                vocab_size=vocab_size,
                base=tokenizer,
                path=tokenizer.replace(".model", "_chat.model"),
            ),
            rope=dict(start_theta=500_000.0, end_theta=500_000.0),
            loss=dict(z_loss=0.0),
            optimizer=dict(peak_lr=own["peak_lr"]),
            schedule=dict(
                warmup_steps=warmup_steps, decay_start=warmup_steps, total_steps=own["steps"]
            ),
            data=dict(sources=own["shares"], validation=(), max_segments=32),
            gates=dict(perplexity=()),
            samples=dict(every=own["sample_every"], prompts=own["prompts"]),
        )
    )


def _stage(values: dict[str, Any]) -> ConfigDict:
    # One micro-batch per step: 65,536 tokens at a time on each of two 80 GB GPUs. On one, use 2.
    stage = ConfigDict(values | {"accumulation": 1})
    # Follows the other two, however they are overridden.
    stage.tokens_per_step = stage.get_ref("batch_size") * stage.get_ref("seq_len")
    return stage


def recipe(scale: str, stages: list[ConfigDict]) -> ConfigDict:
    """The config of a single stage, or of several in order (`config.stages`), with the corpora
    that they read."""
    config = base(scale)
    text = [name for stage in stages if "task" not in stage for name in stage.data.sources]
    tuned = [name for stage in stages if "task" in stage for name in stage.data.sources]
    if scale == "nano" and text:
        text = nano.CORPORA
    part = PHASE_ENDS[scale][-1] / PHASE_ENDS["1b"][-1]  # of the budgets, which are those of 1b
    with config.unlocked():
        config.corpora = ConfigDict(
            {
                name: CORPORA[name] | {"max_tokens": int(CORPORA[name]["max_tokens"] * part)}
                for name in dict.fromkeys(text)
            }
        )
        config.tuning = ConfigDict({name: TUNING[name] for name in tuned})
        if len(stages) == 1:
            config.update(stages[0])
        else:
            config.stages = ConfigDict({stage.name: stage for stage in stages})
            # All corpora in every phase: this shows what a later phase forgets.
            config.data.validation = tuple(dict.fromkeys(text))
    return config


def own(scale: str) -> ConfigDict:
    """A recipe for any text: `config.text` names it. The number of steps, the schedule and the
    vocabulary are absent: nanollama_jax/own.py derives them from the text."""
    config = base(scale)
    values = dict(seq_len=4096)
    if scale == "nano":
        values |= nano.STAGES["own"]
    with config.unlocked():
        config.update(
            _stage(
                dict(
                    name="own",
                    start_step=0,
                    seq_len=values["seq_len"],
                    batch_size=TOKENS_PER_STEP[scale] // values["seq_len"],
                    data=dict(dir="data/own", sources={"text": 1.0}),
                )
            )
        )
        config.text, config.epochs = "", 1.0
        config.corpora.text = corpus("auto")
        config.warmup_fraction, config.decay_fraction = 0.05, 0.2
        config.tokenizer.path, config.tokenizer.sources = "auto", ("text",)
        config.model.vocab_size = 0
        config.gates.perplexity = ()
        config.data.benchmarks = ConfigDict(dict.fromkeys(BENCHMARKS, ""))
        del config.schedule["warmup_steps"]
        del config.schedule["decay_start"]
        del config.schedule["total_steps"]
    return config
