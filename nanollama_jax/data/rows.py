"""Prepared conversations and pairs -> packed batches.

Conversations and pairs are packed whole, best-fit, each as a document of its own in the row's
attention mask. Which units share a row is decided once (best-fit over the shuffled source); each
epoch reads all rows in a new order. A unit is a conversation, or a pair whose two sides are
adjacent segments, 2p + 1 and 2p + 2. Batches are those of data/pipeline.py; batches of pairs have

    pairs    (B, M / 2) int32    the number of the pair in each slot, -1 in empty ones: the key of
                                 its reference log-probabilities
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from nanollama_jax.data.pipeline import Batch, Source, source_seed, whole_batches
from nanollama_jax.data.records import SAID
from nanollama_jax.data.shards import naming_shard, split_shards
from nanollama_jax.errors import BadInput


def best_fit(lengths: Sequence[int], capacity: int, max_units: int) -> list[list[int]]:
    """Bins of indices of `lengths`: at most `max_units` each, with a sum of at most `capacity`.

    In the given order, each unit goes into the fullest bin that has room. Longest first would fill
    a little more (docs/post_training.md), but rows would hold units of similar length, hence of one
    kind, and consecutive batches would differ in kind.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by remaining room
    present = 0  # bit r is set if with_room[r] has a bin
    for index, length in enumerate(lengths):
        fitting = present >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            present &= ~(0 if with_room[room] else 1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        room -= length
        if room and len(bins[number]) < max_units:
            with_room[room].append(number)
            present |= 1 << room
    return bins


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a split, for random access by Grain. All in memory: 4 bytes per token."""

    units: list[list[np.ndarray]]  # one or two sides each, uint32 with SAID
    bins: list[list[int]]
    seq_len: int
    max_segments: int
    pairs: bool
    first_pair: int = 0  # the number of the first unit, among all sources and splits

    @classmethod
    def of(
        cls, source: Source, split: str, *, seq_len: int, max_segments: int, first_pair: int = 0
    ) -> "Rows":
        """Raises BadInput for a source that was prepared for longer rows."""
        if (max_tokens := source.manifest["max_tokens"]) > seq_len:
            raise BadInput(
                f"{source.directory} was prepared for rows of {max_tokens} tokens: remove it and "
                f"prepare it for {seq_len}"
            )
        pairs = source.manifest["kind"] == "preferences"
        units = []
        for path in split_shards(source.directory, source.manifest, split):
            for record in _read_all(path):
                ids = np.frombuffer(record, np.uint32)
                units.append([ids[1 : 1 + ids[0]], ids[1 + ids[0] :]] if pairs else [ids])
        units = [units[i] for i in np.random.default_rng(0).permutation(len(units))]
        lengths = [sum(map(len, unit)) for unit in units]
        bins = best_fit(lengths, seq_len, max_segments // 2 if pairs else max_segments)
        return cls(units, bins, seq_len, max_segments, pairs, first_pair)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        T = self.seq_len
        names = "tokens", "targets", "segment_ids", "positions"
        row = {name: np.zeros(T, np.int32) for name in names}
        row["loss_weights"] = np.zeros(T, np.float32)
        start = segment = 0
        for index in self.bins[number]:
            for side in self.units[index]:
                segment += 1
                end = start + len(side)
                ids = (side & ~SAID).astype(np.int32)
                row["tokens"][start:end] = ids
                row["targets"][start : end - 1] = ids[1:]
                row["loss_weights"][start : end - 1] = side[1:] >> 31
                row["segment_ids"][start:end] = segment
                row["positions"][start:end] = np.arange(len(side))
                start = end
        row["segment_ids"][start:] = min(segment + 1, self.max_segments)
        row["positions"][start:] = np.arange(T - start)
        if self.pairs:
            numbers = np.array(self.bins[number], np.int32) + self.first_pair
            row["pairs"] = np.full(self.max_segments // 2, -1, np.int32)
            row["pairs"][: len(numbers)] = numbers
        return row

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that is not padding."""
        tokens = sum(len(side) for unit in self.units for side in unit)
        return tokens / max(1, len(self) * self.seq_len)

    def batches(self, batch_size: int, max_rows: float = math.inf) -> Iterator[Batch]:
        """The first `max_rows` rows as `whole_batches`."""
        numbers = range(int(min(max_rows, len(self))))
        return whole_batches(map(self.__getitem__, numbers), batch_size)


def train_batches(
    rows: Mapping[str, Rows], weights: Mapping[str, float], *, batch_size: int, seed: int
):
    """Endless global batches of the sources in `weights`, which are shares of rows.

    A grain.IterDataset: its iterators have get_state and set_state.
    """
    shuffled = {
        name: grain.MapDataset.source(rows[name])
        .seed(source_seed(seed, name))
        .shuffle()
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads=1))
        for name in sorted(weights)
    }
    mixed = grain.IterDataset.mix(shuffled, {name: weights[name] for name in shuffled})
    return grain.experimental.ThreadPrefetchIterDataset(
        mixed.batch(batch_size), prefetch_buffer_size=2
    )


def _read_all(path) -> list[bytes]:
    with naming_shard(path):
        reader = ArrayRecordReader(str(path))
        return reader.read_all() if reader.num_records() else []
