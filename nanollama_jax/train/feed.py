"""What a stage reads: its sources, found whole, the iterator of its training batches, and its validation batches."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.data import mix, pipeline, rows
from nanollama_jax.data.pipeline import Batch, Source
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.metrics import log

HOLDS = {
    "pretrain": "documents",
    "sft": "conversations",
    "dpo": "preferences",
}  # task -> what its sources hold


@dataclasses.dataclass(frozen=True)
class Feed:
    sources: dict[str, Source]  # of training and validation
    batches: Any  # a Grain iterator
    validation: dict[str, list[Batch]]
    rows: list[
        rows.Rows
    ]  # sft, dpo: of every split that is read; DPO's pairs are numbered across all
    shuffle_windows: dict[str, int] | None = (
        None  # pretrain: source -> rows that are shuffled among each other
    )


def open_feed(
    config: ConfigDict, tokenizer: Tokenizer, windows: dict[str, int] | None = None
) -> Feed:
    """`windows`: the shuffle windows of the run that is resumed. Raises BadInput for what is missing, damaged, or not for this stage."""
    shares, validated = (
        dict(config.data.sources),
        config.data.validation or tuple(config.data.sources),
    )
    names = dict.fromkeys((*shares, *validated))
    sources = {
        name: pipeline.open_source(config.data.dir, name, tokenizer, HOLDS[config.task])
        for name in names
    }
    pipeline.check_weights(sources, shares)
    if not set(validated) & set(shares):
        raise BadInput(
            f"data.validation={validated} names none of data.sources: name one of {', '.join(shares)} too"
        )
    packing = dict(seq_len=config.seq_len, max_segments=config.data.max_segments)
    steps = config.end_step - config.start_step
    of_step = dict(batch_size=config.batch_size, seed=config.seed)
    of_validation = dict(
        batch_size=config.batch_size // config.accumulation,
        max_rows=max(1, config.validation.tokens // config.seq_len),
    )
    if config.task == "pretrain":
        warn_of_repetition(mix.epochs(sources, shares, steps * config.tokens_per_step), config.name)
        if windows is None or windows.keys() != shares.keys():
            windows = pipeline.shuffle_windows(shares, config.seq_len, steps * config.batch_size)
        batches = pipeline.train_batches(
            sources, shares, tokenizer, windows=windows, **of_step, **packing
        )
        validation = {
            name: pipeline.validation_batches(sources[name], tokenizer, **of_validation, **packing)
            for name in validated
        }
        return Feed(sources, iter(batches), validation, [], windows)
    opened, pairs = {}, 0
    for name, split in sorted(
        {(name, "train") for name in shares} | {(name, "validation") for name in validated}
    ):
        opened[name, split] = rows.Rows.of(sources[name], split, first_pair=pairs, **packing)
        pairs += len(opened[name, split].units)
    read = {
        name: steps * config.batch_size * share / sum(shares.values())
        for name, share in shares.items()
    }  # rows
    warn_of_repetition(
        {name: count / len(opened[name, "train"]) for name, count in read.items()}, config.name
    )
    for name in shares:
        found = opened[name, "train"]
        log.info(
            "%s: %s: %d %s in %d rows, %.0f %% full",
            config.name,
            name,
            len(found.units),
            HOLDS[config.task],
            len(found),
            100 * found.fill,
        )
    batches = rows.train_batches(
        {name: opened[name, "train"] for name in shares}, shares, **of_step
    )
    if empty := [name for name in validated if not len(opened[name, "validation"])]:
        raise BadInput(
            f"source {empty[0]!r} has no validation rows: raise data.tuning_validation_fraction and prepare it again"
        )
    validation = {
        name: list(opened[name, "validation"].batches(**of_validation)) for name in validated
    }
    return Feed(sources, iter(batches), validation, list(opened.values()))


def warn_of_repetition(epochs: dict[str, float], stage: str) -> None:
    for line in mix.repetition_warnings(epochs, stage):
        log.warning("%s", line)
