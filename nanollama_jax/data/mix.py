"""What a stage's mix of sources holds: how often each source is read, and what is in the rows that training reads.

Rows come from `pipeline.packed_rows` with the run's seed and the stage's row length, from the beginning of the source's order and before they
are shuffled among each other. The first stage with this source trains on them; a later one goes on where the stage before stopped
(`pipeline.positions`), so its own rows are alike, not the same. A document's part in a row is a piece; that of a merged document is one too, though
it shares its segment.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from nanollama_jax.console import track
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

# Up to 4 epochs repeated data is nearly as good as new; beyond, its worth falls off fast (Muennighoff et al. 2023, arXiv:2305.16264).
MAX_EPOCHS = 4


def tokens_on_disk(source: pipeline.Source) -> int:
    """Of the training split, with BOS and EOS."""
    return source.tokens("train") + 2 * source.manifest["splits"]["train"]["documents"]


def epochs(
    sources: Mapping[str, pipeline.Source], shares: Mapping[str, float], tokens: int
) -> dict[str, float]:
    """How many times each source in `shares` (name -> weight, of any sum above 0) is read when `tokens` are read in all.

    BOS and EOS count on both sides: `tokens` is steps x tokens per step. Sources that `pipeline.train_batches` takes have no 0 to divide by.
    """
    total = sum(shares.values())
    return {
        name: tokens * share / total / tokens_on_disk(sources[name])
        for name, share in shares.items()
    }


def repetition_warnings(epochs: Mapping[str, float], during: str) -> list[str]:
    """A line for each source that is read more than `MAX_EPOCHS` times; `during` names what reads it."""
    return [
        f"{name} is read {times:.2f} times in {during}: beyond {MAX_EPOCHS} times, text is worth less and less "
        "(Muennighoff et al. 2023): prepare more of it, or lower its share"
        for name, times in epochs.items()
        if times > MAX_EPOCHS
    ]


@dataclasses.dataclass(frozen=True)
class Mix:
    """A stage's sources, opened as its training opens them."""

    name: str
    sources: dict[str, pipeline.Source]
    shares: dict[str, float]  # sum to 1
    tokens: int  # that the stage reads
    epochs: dict[str, float]
    seq_len: int
    max_segments: int
    seed: int


def open_mix(config: ConfigDict, tokenizer: Tokenizer) -> Mix:
    """`config` is one stage's. Raises BadInput for what training would not read either."""
    weights, rows = (
        dict(config.data.sources),
        (config.end_step - config.start_step) * config.batch_size,
    )
    if not weights:
        raise BadInput(
            "data.sources is empty: name at least one prepared corpus and its share in the recipe"
        )
    if min(rows, config.seq_len, config.data.max_segments) < 1:
        raise BadInput(
            f"{config.name} has {rows:,} rows of {config.seq_len} tokens and data.max_segments={config.data.max_segments}: none may be below 1"
        )
    sources = {name: pipeline.open_source(config.data.dir, name, tokenizer) for name in weights}
    packing = dict(seq_len=config.seq_len, max_segments=config.data.max_segments, seed=config.seed)
    pipeline.check_weights(sources, weights)
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    tokens = rows * config.seq_len
    return Mix(config.name, sources, shares, tokens, epochs(sources, shares, tokens), **packing)


def epochs_of_all(mixes: Iterable[Mix]) -> dict[str, float]:
    """How many times each source is read in all stages together, in the order in which they first name it."""
    total = collections.Counter()
    for mix in mixes:
        total.update(mix.epochs)
    return dict(total)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What N packed rows of one source hold, one after another. A training stream is endless: no row is padded."""

    pieces: list[np.ndarray]  # N arrays: tokens of each document's piece of the row
    continued: list[bool]  # N: whether the first piece goes on from the row before
    learnt: float  # share of the tokens; the rest are EOS
    merged: int  # documents that share a segment with the one before, for want of max_segments
    begun: int  # documents, by their BOS
    cut: int  # of these, by the end of the row that they begin in
    samples: dict[int, pipeline.Batch]  # some of the rows, by number

    @property
    def documents_N(self) -> np.ndarray:
        return np.array([len(pieces) for pieces in self.pieces])

    def context_histogram(self, seq_len: int) -> np.ndarray:
        """Share of the rows whose longest piece falls into each of `context_bins`."""
        longest_N, bins = [pieces.max() for pieces in self.pieces], context_bins(seq_len)
        return np.bincount(np.searchsorted(bins, longest_N), minlength=len(bins)) / len(longest_N)

    def long_context(self, seq_len: int) -> float:
        """Share of tokens with at least half a row of their own document before them: a half where every row is one document's."""
        return sum(np.maximum(pieces - seq_len // 2, 0).sum() for pieces in self.pieces) / (
            len(self.pieces) * seq_len
        )


def context_bins(seq_len: int) -> list[int]:
    """Upper ends, in tokens: the last five powers of two below `seq_len`, and itself."""
    return [2**k for k in range(seq_len.bit_length()) if 2**k < seq_len][-5:] + [seq_len]


def describe(
    rows: Iterable[pipeline.Batch], tokenizer: Tokenizer, sample: Collection[int] = ()
) -> Rows:
    """`rows` are as `pipeline.packed_rows` gives them; those numbered in `sample` are kept."""
    pieces, continued, samples, learnt, merged, begun, cut = [], [], {}, [], 0, 0, 0
    for number, row in enumerate(rows):
        starts = np.flatnonzero(row["tokens"] == tokenizer.bos_id)
        continued.append(0 not in starts)
        pieces.append(np.diff([0] * continued[-1] + [*starts, len(row["tokens"])]))
        learnt.append(row["loss_weights"].mean())
        merged += pipeline.merged_documents(row, tokenizer.bos_id)
        begun += len(starts)
        cut += len(starts) > 0 and row["tokens"][-1] != tokenizer.eos_id
        if number in sample:
            samples[number] = row
    return Rows(pieces, continued, float(np.mean(learnt)), merged, begun, int(cut), samples)


def read_rows(mix: Mix, name: str, tokenizer: Tokenizer, count: int, console: Console) -> Rows:
    """The first `count` rows of a source's order, or one epoch if that is less."""
    count = min(count, max(1, tokens_on_disk(mix.sources[name]) // mix.seq_len))
    label = f"{mix.name}: reading {count:,} rows of {name}"
    if not console.is_terminal:
        console.print(label, soft_wrap=True)
    packed = pipeline.packed_rows(
        mix.sources[name],
        tokenizer,
        seq_len=mix.seq_len,
        max_segments=mix.max_segments,
        seed=mix.seed,
    )
    with contextlib.closing(iter(packed)) as iterator:
        bar = track(itertools.islice(iterator, count), label, count, on=console, transient=True)
        return describe(bar, tokenizer, sample=(0, count // 2))
