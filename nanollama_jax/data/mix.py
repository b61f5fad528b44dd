"""What a stage's mix holds: how often each source is read, and what is in the rows training reads.

Rows come from `pipeline.packed_rows` with the run's seed and the stage's row length, from the start
of the source's order and before rows are shuffled. The first stage that uses a source trains on
them. A later stage resumes where the previous one stopped (`pipeline.positions`), so its rows are
similar, not the same. A piece is the part of a document that lies in one row; a merged document
is a piece of its own, although it shares its segment.
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

# Up to 4 epochs, repeated data is nearly as good as new; beyond that its value falls off fast
# (Muennighoff et al. 2023, arXiv:2305.16264).
MAX_EPOCHS = 4


def tokens_on_disk(source: pipeline.Source) -> int:
    """Tokens of the training split, with BOS and EOS."""
    return source.tokens("train") + 2 * source.manifest["splits"]["train"]["documents"]


def epochs(
    sources: Mapping[str, pipeline.Source], shares: Mapping[str, float], tokens: int
) -> dict[str, float]:
    """How many times each source in `shares` (name -> weight, of any positive sum) is read.

    `tokens` is steps x tokens per step, so BOS and EOS count on both sides. Sources that pass
    `pipeline.check_weights` cannot divide by 0.
    """
    total = sum(shares.values())
    return {
        name: tokens * share / total / tokens_on_disk(sources[name])
        for name, share in shares.items()
    }


def repetition_warnings(epochs: Mapping[str, float], during: str) -> list[str]:
    """A line for each source that is read more than `MAX_EPOCHS` times in the stage `during`."""
    return [
        f"{name} is read {times:.2f} times in {during}: beyond {MAX_EPOCHS} times, repeated text "
        "is worth less and less (Muennighoff et al. 2023): prepare more of it, or lower its share"
        for name, times in epochs.items()
        if times > MAX_EPOCHS
    ]


@dataclasses.dataclass(frozen=True)
class Mix:
    """A stage's sources, opened as training opens them."""

    name: str
    sources: dict[str, pipeline.Source]
    shares: dict[str, float]  # sum to 1
    tokens: int  # read by the stage
    epochs: dict[str, float]
    seq_len: int
    max_segments: int
    seed: int


def open_mix(config: ConfigDict, tokenizer: Tokenizer) -> Mix:
    """The mix of one stage's `config`. Raises BadInput for whatever training would refuse."""
    weights = dict(config.data.sources)
    rows = (config.end_step - config.start_step) * config.batch_size
    if not weights:
        raise BadInput("data.sources is empty: name at least one prepared corpus and its share")
    if min(rows, config.seq_len, config.data.max_segments) < 1:
        raise BadInput(
            f"{config.name} has {rows:,} rows of {config.seq_len} tokens and data.max_segments="
            f"{config.data.max_segments}: each must be at least 1"
        )
    sources = {name: pipeline.open_source(config.data.dir, name, tokenizer) for name in weights}
    packing = dict(seq_len=config.seq_len, max_segments=config.data.max_segments, seed=config.seed)
    pipeline.check_weights(sources, weights)
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    tokens = rows * config.seq_len
    return Mix(config.name, sources, shares, tokens, epochs(sources, shares, tokens), **packing)


def epochs_of_all(mixes: Iterable[Mix]) -> dict[str, float]:
    """How many times all stages together read each source, in order of first mention."""
    total = collections.Counter()
    for mix in mixes:
        total.update(mix.epochs)
    return dict(total)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Statistics of N consecutive packed rows of one source.

    A training stream is endless: no row is padded.
    """

    pieces: list[np.ndarray]  # N arrays: lengths in tokens of the row's pieces
    continued: list[bool]  # N: whether the first piece continues the previous row's document
    learned: float  # share of tokens with a loss; the rest are EOS
    merged: int  # documents that share a segment with their predecessor: max_segments is too small
    started: int  # documents that start in these rows, by their BOS
    cut: int  # of these, documents cut by the end of their first row
    samples: dict[int, pipeline.Batch]  # some of the rows, by number

    @property
    def documents_N(self) -> np.ndarray:
        return np.array([len(pieces) for pieces in self.pieces])

    def context_histogram(self, seq_len: int) -> np.ndarray:
        """Share of rows whose longest piece falls into each of `context_bins`."""
        longest_N, bins = [pieces.max() for pieces in self.pieces], context_bins(seq_len)
        return np.bincount(np.searchsorted(bins, longest_N), minlength=len(bins)) / len(longest_N)

    def long_context(self, seq_len: int) -> float:
        """Share of tokens with at least seq_len / 2 tokens of their own document before them.

        One half where every row is a single document.
        """
        tokens = sum(np.maximum(pieces - seq_len // 2, 0).sum() for pieces in self.pieces)
        return tokens / (len(self.pieces) * seq_len)


def context_bins(seq_len: int) -> list[int]:
    """Upper ends of bins, in tokens: the last five powers of two below `seq_len`, and `seq_len`."""
    return [2**k for k in range(seq_len.bit_length()) if 2**k < seq_len][-5:] + [seq_len]


def describe(
    rows: Iterable[pipeline.Batch], tokenizer: Tokenizer, sample: Collection[int] = ()
) -> Rows:
    """Statistics of `rows` from `pipeline.packed_rows`; rows numbered in `sample` are kept."""
    pieces, continued, samples, learned, merged, started, cut = [], [], {}, [], 0, 0, 0
    for number, row in enumerate(rows):
        starts = np.flatnonzero(row["tokens"] == tokenizer.bos_id)
        continued.append(0 not in starts)
        pieces.append(np.diff([0] * continued[-1] + [*starts, len(row["tokens"])]))
        learned.append(row["loss_weights"].mean())
        merged += pipeline.merged_documents(row, tokenizer.bos_id)
        started += len(starts)
        cut += len(starts) > 0 and row["tokens"][-1] != tokenizer.eos_id
        if number in sample:
            samples[number] = row
    return Rows(pieces, continued, float(np.mean(learned)), merged, started, int(cut), samples)


def read_rows(mix: Mix, name: str, tokenizer: Tokenizer, count: int, console: Console) -> Rows:
    """Statistics of the first `count` rows of a source's order, or of one epoch if that is less."""
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
