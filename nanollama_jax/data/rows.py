"""Prepared conversations and pairs -> packed batches: whole ones only, best-fit, each a document of its own in the row's mask.

A row is a set of units that is decided once (best-fit over the whole source, shuffled); each epoch reads all rows in another order. A unit is a
conversation or a pair, whose two sides are neighbouring segments, 2p + 1 and 2p + 2. Batches are as in data/pipeline.py; those of pairs have besides

    pairs    (B, M / 2) int32    the number of each slot's pair, -1 in empty ones: what its reference log-probabilities are looked up by
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from nanollama_jax.data.pipeline import Batch, Source, own_seed
from nanollama_jax.data.records import SAID
from nanollama_jax.data.shards import naming_shard, split_shards
from nanollama_jax.errors import BadInput


def best_fit(lengths: Sequence[int], capacity: int, max_units: int) -> list[list[int]]:
    """Bins of indices of `lengths`, each of at most `max_units` whose sum is at most `capacity`: in the order given, each into the fullest bin that
    has room. Longest first fills a little more (docs/post_training.md), but with rows of like lengths, which are of one kind: consecutive batches
    would differ by it."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that is left
    present = 0  # bit r is set where with_room[r] has a bin
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
    """The rows of a split, by number: what Grain reads at random. It is in memory whole: 4 bytes a token."""

    units: list[list[np.ndarray]]  # each of one side or two, uint32 with SAID
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
        if source.manifest["max_tokens"] > seq_len:
            was = source.manifest["max_tokens"]
            raise BadInput(
                f"{source.directory} was prepared for rows of {was} tokens: remove it and prepare it for {seq_len}"
            )
        pairs = source.manifest["kind"] == "preferences"
        records = [
            np.frombuffer(record, np.uint32)
            for path in split_shards(source.directory, source.manifest, split)
            for record in _read_all(path)
        ]
        records = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
        units = [
            [record[1 : 1 + record[0]], record[1 + record[0] :]] if pairs else [record]
            for record in records
        ]
        bins = best_fit(
            [sum(map(len, unit)) for unit in units],
            seq_len,
            max_segments // 2 if pairs else max_segments,
        )
        return cls(units, bins, seq_len, max_segments, pairs, first_pair)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        T = self.seq_len
        row = {
            name: np.zeros(T, np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        } | {"loss_weights": np.zeros(T, np.float32)}
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
            row["pairs"] = np.full(self.max_segments // 2, -1, np.int32)
            row["pairs"][: len(self.bins[number])] = (
                np.array(self.bins[number], np.int32) + self.first_pair
            )
        return row

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that are not padding."""
        return sum(len(side) for unit in self.units for side in unit) / max(
            1, len(self) * self.seq_len
        )

    def batches(self, batch_size: int, max_rows: float = math.inf) -> Iterator[Batch]:
        """The first `max_rows` rows as whole batches, the last filled up with rows that weigh nothing."""
        count = int(min(max_rows, len(self)))
        for start in range(0, count, batch_size):
            rows = [self[number] for number in range(start, min(start + batch_size, count))]
            empty = {
                name: np.full_like(array, -1 if name == "pairs" else 0)
                for name, array in rows[0].items()
            }
            rows += [empty] * (batch_size - len(rows))
            yield {name: np.stack([row[name] for row in rows]) for name in empty}


def train_batches(
    rows: Mapping[str, Rows], weights: Mapping[str, float], *, batch_size: int, seed: int
):
    """Endless global batches of the sources in `weights`, which are shares of rows. A grain.IterDataset: iterators have get_state and set_state."""
    shuffled = {
        name: grain.MapDataset.source(rows[name])
        .seed(own_seed(seed, name))
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
