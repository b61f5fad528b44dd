"""What a stage reads: its sources, checked, and its batches."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.data import mix, pipeline, rows
from nanollama_jax.data.pipeline import Batch, Source
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.metrics import log


@dataclasses.dataclass(frozen=True)
class Feed:
    """A stage's data. Pairs of DPO are numbered across all `rows`."""

    sources: dict[str, Source]  # of training and validation
    batches: Any  # a Grain iterator
    validation: dict[str, list[Batch]]  # by source
    rows: list[rows.Rows]  # fine-tuning: every split that is read
    shuffle_windows: dict[str, int] | None = None  # pre-training: source -> rows


def open_sources(
    data: ConfigDict, tokenizer: Tokenizer, holds: str
) -> tuple[dict[str, float], dict[str, Source], list[str]]:
    """`(shares, sources, validated)`: each training source's share, all sources by name, and the
    names of those to validate on. Raises BadInput unless all are prepared and hold what they must.
    """
    shares = dict(data.sources)
    validated = list(data.validation or shares)
    names = dict.fromkeys((*shares, *validated))
    sources = {name: pipeline.open_source(data.dir, name, tokenizer, holds) for name in names}
    pipeline.check_weights(sources, shares)
    if not set(validated) & set(shares):
        raise BadInput(
            f"data.validation={tuple(validated)} names none of data.sources: add one of "
            f"{', '.join(shares)}"
        )
    return shares, sources, validated


def open_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model. Raises BadInput if it has another vocabulary."""
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise BadInput(
            f"{path} has {tokenizer.vocab_size} pieces and model.vocab_size={vocab_size}: make "
            "them agree"
        )
    return tokenizer


def packing(config: ConfigDict) -> tuple[dict[str, int], dict[str, int]]:
    """Keyword arguments of training batches and of validation batches."""
    shape = dict(seq_len=config.seq_len, max_segments=config.data.max_segments)
    return (
        dict(batch_size=config.batch_size, seed=config.seed, **shape),
        dict(
            batch_size=config.batch_size // config.accumulation,
            max_rows=max(1, config.validation.tokens // config.seq_len),
            **shape,
        ),
    )


def warn_of_repetition(epochs: dict[str, float], stage: str) -> None:
    """Logs a warning for each source that is read too often."""
    for line in mix.repetition_warnings(epochs, stage):
        log.warning("%s", line)


def show_row(batch: Batch, tokenizer: Tokenizer, documents: int = 3, characters: int = 120) -> str:
    """A batch's first row, for the log: its learned tokens, and the beginnings of its first
    documents, with special tokens by name and control characters escaped."""
    tokens, segments = batch["tokens"][0], batch["segment_ids"][0]
    found = [tokens[segments == i].tolist() for i in range(1, segments.max() + 1)]
    found = [ids for ids in found if any(ids)]  # the rest of a row of conversations is padding
    learned = int(batch["loss_weights"][0].sum())
    texts = [repr(tokenizer.show(ids)[:characters]) for ids in found[:documents]]
    return f"{len(found)} segment(s), {learned:,} tokens learned: {' | '.join(texts)}"
