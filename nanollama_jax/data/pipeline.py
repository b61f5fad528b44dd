"""Prepared documents -> packed batches, with Grain.

Each source is shuffled, packed into rows, and its rows are shuffled; then sources are mixed by
weight, batched and prefetched. A batch is a flat dict of (B, T) arrays, the only thing that passes
from data to training:

    tokens        int32    BOS document EOS, BOS document EOS, ... cut at the end of each row; the
                           next row of the source continues with the rest
    targets       int32    the next token of the same document
    loss_weights  float32  0 where nothing is learned: at EOS, whose next token belongs to another
                           document, and at padding
    segment_ids   int32    documents numbered from 1 within a row; padding is a segment of its own
                           (unless the row already has max_segments)
    positions     int32    position within the segment, from 0

Each source has its own endless order of documents, independent of weights and of other sources: the
stages of a curriculum resume it where the previous stage stopped (`positions`). Weights are shares
of rows, hence of tokens, however long a source's documents are. Every process assembles the whole
global batch and places only its own rows (`sharding.put_batch`): packing is far faster than
training, and the order of rows and the iterator state in a checkpoint depend neither on the number
of processes nor on the number of devices.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from nanollama_jax.data.shards import (
    MANIFEST,
    dtype_for,
    load_manifest,
    naming_shard,
    split_shards,
    verify_shards,
)
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]

# How many packed rows of a source are shuffled together, for rows of up to 4,096 tokens. For longer
# rows the limit is in tokens, to save memory.
SHUFFLE_ROWS = 512
# Per source. With 1, 4 and 16 threads, documents of 2,800 tokens are packed at 6.7, 5.5 and 3.7M
# tokens/s, and documents of 85 tokens at 0.4, 0.6 and 0.2M tokens/s (two cores).
READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=128)


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared corpus whose shards are complete and whose tokens are this tokenizer's."""

    name: str
    directory: pathlib.Path
    manifest: dict[str, Any]

    def tokens(self, split: str) -> int:
        """Tokens on disk, without BOS and EOS of documents."""
        return self.manifest["splits"][split]["tokens"]


def open_source(
    directory: str | pathlib.Path, name: str, tokenizer: Tokenizer, kind: str = "documents"
) -> Source:
    """`kind` is documents, conversations or preferences.

    Raises BadInput for a missing corpus, one of another kind or another tokenizer, and for a
    missing or truncated shard.
    """
    directory = pathlib.Path(directory) / name
    manifest = load_manifest(directory)
    if (found := manifest.get("kind", "documents")) != kind:
        raise BadInput(
            f"{directory} holds {found} and this stage trains on {kind}: name another source in "
            "data.sources"
        )
    if (sha256 := manifest["tokenizer_sha256"]) != tokenizer.sha256:
        raise BadInput(
            f"{directory} was tokenized with another tokenizer (sha256 {sha256[:12]}, this one is "
            f"{tokenizer.sha256[:12]}): set tokenizer.path to that one, or prepare into another "
            "data.dir"
        )
    dtype = dtype_for(tokenizer.vocab_size) if kind == "documents" else "uint32"
    if manifest["dtype"] != dtype:
        raise BadInput(
            f"{directory / MANIFEST} has dtype={manifest['dtype']} but {kind} are stored as "
            f"{dtype}: restore the file from a copy"
        )
    verify_shards(directory, manifest)
    return Source(name, directory, manifest)


def fingerprint(sources: Mapping[str, Source]) -> str:
    """sha256 over the manifests, shard checksums included: names the data of a checkpoint."""
    manifests = {name: source.manifest for name, source in sources.items()}
    return hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()


def train_batches(
    sources: Mapping[str, Source],
    weights: Mapping[str, float],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    max_segments: int,
    seed: int,
    windows: Mapping[str, int] | None = None,
) -> grain.IterDataset:
    """Endless global batches of the sources in `weights`. Iterators have get_state and set_state.

    `windows` maps a source to the number of rows that are shuffled together (default: the largest).
    A state is valid only for the same `windows`.
    """
    check_weights(sources, weights)
    shuffled = {}
    for name in sorted(weights):
        packed = packed_rows(
            sources[name], tokenizer, seq_len=seq_len, max_segments=max_segments, seed=seed
        )
        # A long document fills many consecutive rows: without this a batch could be one book
        window = windows[name] if windows else shuffle_window(seq_len)
        shuffled[name] = grain.experimental.WindowShuffleIterDataset(
            packed, window_size=window, seed=source_seed(seed, name)
        )
    mixed = grain.IterDataset.mix(shuffled, {name: weights[name] for name in shuffled})
    return grain.experimental.ThreadPrefetchIterDataset(
        mixed.batch(batch_size), prefetch_buffer_size=2
    )


def check_weights(sources: Mapping[str, Source], weights: Mapping[str, float]) -> None:
    """Raises BadInput for a weight that is not positive, or a source without training documents."""
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise BadInput(
                f"data.sources.{name}={weight}: a weight must be above 0; to leave a source out, "
                "remove its entry"
            )
        if not sources[name].tokens("train"):
            raise BadInput(
                f"source {name!r} has no training documents: prepare more text, or remove it from "
                "data.sources"
            )


def shuffle_window(seq_len: int, rows: int | None = None) -> int:
    """How many rows of a source are shuffled together in a stage that reads `rows` of it.

    A stage of few windows ends just after a window ends, because the next stage restarts the
    current window: otherwise the nano curriculum would read a whole window twice.
    """
    window = min(SHUFFLE_ROWS, max(1, SHUFFLE_ROWS * 4096 // seq_len))
    if rows is None or rows >= 8 * window:
        return window
    rows = max(1, rows - 2)  # the mix is within a row of the shares
    return rows // -(-rows // window)


def shuffle_windows(weights: Mapping[str, float], seq_len: int, rows: int) -> dict[str, int]:
    """Each source's shuffle window in a stage that reads `rows` rows of all sources together."""
    total = sum(weights.values())
    return {
        name: shuffle_window(seq_len, int(rows * weight / total))
        for name, weight in weights.items()
    }


def positions(state: dict[str, Any], sources: Mapping[str, Source], seed: int) -> dict[str, Any]:
    """Each source's position, from the state of a `train_batches` iterator.

    A position is the first document of the current shuffle window, with the seed and the corpus
    that define the order it counts in.
    """
    return {
        name: {
            "at": parent["parent_window_start_state"],
            "seed": seed,
            "corpus": fingerprint({name: sources[name]}),
        }
        for name, parent in state["parents"].items()
    }


def resume_at(
    state: dict[str, Any], positions: Mapping[str, Any], sources: Mapping[str, Source], seed: int
) -> tuple[dict[str, Any], list[str]]:
    """The state of a new iterator, with its sources moved to `positions`.

    The weights and the row length may differ from those the positions were read with: no document
    is skipped, and at most the rows of one window are read again. A source without a position
    starts from its beginning. So does a source whose position is invalid because the seed or the
    corpus changed: the second result names these.
    """
    parents, restarted = dict(state["parents"]), []
    for name in parents.keys() & positions.keys():
        position = positions[name]
        order = seed, fingerprint({name: sources[name]})
        if (position["seed"], position["corpus"]) == order:
            parents[name] = parents[name] | {"parent_window_start_state": position["at"]}
        else:
            restarted.append(name)
    return state | {"parents": parents}, sorted(restarted)


def source_seed(seed: int, name: str) -> int:
    return (seed + zlib.crc32(name.encode())) % 2**31  # Grain's shuffles take 32 bits


def packed_rows(
    source: Source, tokenizer: Tokenizer, *, seq_len: int, max_segments: int, seed: int
) -> grain.IterDataset:
    """Endless rows of the training documents, shuffled differently in each epoch.

    The rows of one document are consecutive.
    """
    documents = _documents(source, "train", tokenizer).seed(source_seed(seed, source.name))
    documents = documents.shuffle().repeat()
    return PackIterDataset(documents.to_iter_dataset(READ_AHEAD), seq_len, max_segments)


def validation_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    max_segments: int,
    max_rows: int,
) -> list[Batch]:
    """The same `max_rows` rows of the validation split every time, as `whole_batches`.

    Raises BadInput for an empty split.
    """
    if not source.tokens("validation"):
        raise BadInput(
            f"source {source.name!r} has no validation documents: raise data.validation_fraction "
            "and prepare it again"
        )
    documents = _documents(source, "validation", tokenizer).seed(0).shuffle()
    one_thread = grain.ReadOptions(num_threads=1)
    packed = PackIterDataset(documents.to_iter_dataset(one_thread), seq_len, max_segments)
    # Shuffled, or a few long documents would fill the first rows
    shuffled = grain.experimental.WindowShuffleIterDataset(
        packed, window_size=shuffle_window(seq_len), seed=0
    )
    return list(whole_batches(itertools.islice(shuffled, max_rows), batch_size))


def whole_batches(rows: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """Rows stacked into batches; the last batch is filled up with rows of weight 0."""
    while some := list(itertools.islice(rows, batch_size)):
        empty = {k: np.full_like(array, -1 if k == "pairs" else 0) for k, array in some[0].items()}
        some += [empty] * (batch_size - len(some))
        yield {name: np.stack([row[name] for row in some]) for name in empty}


def merged_documents(batch: Batch, bos_id: int) -> int:
    """Documents of a batch that share a segment because their row already held `max_segments`."""
    return int(np.sum((batch["tokens"] == bos_id) & (batch["positions"] > 0)))


def _documents(source: Source, split: str, tokenizer: Tokenizer) -> grain.MapDataset:
    """Documents as int32 arrays, with BOS and EOS."""
    dtype = np.dtype(source.manifest["dtype"])
    bos, eos = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    return grain.MapDataset.source(_Records(source, split)).map(
        lambda record: np.concatenate([bos, np.frombuffer(record, dtype), eos])
    )


class _Records:
    """The records of a split by number, for Grain. An error names the damaged shard."""

    def __init__(self, source: Source, split: str):
        self._shards = split_shards(source.directory, source.manifest, split)
        shards = source.manifest["splits"][split]["shards"]
        self._ends = np.cumsum([shard["documents"] for shard in shards])
        with naming_shard(source.directory / f"{split}-*"):  # the error does not say which one
            self._records = grain.sources.ArrayRecordDataSource(list(map(str, self._shards)))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> bytes:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        with naming_shard(self._shards[min(shard, len(self._shards) - 1)]):
            return self._records[number]


class PackIterDataset(grain.IterDataset):
    """Concat-then-split packing: documents laid end to end and cut into rows of `seq_len`.

    Nothing is dropped; only the last row of a finite stream is padded. A row holds at most
    `max_segments` segments (packed attention kernels need a static bound): further documents are
    merged into the last segment, as if they were one document (`merged_documents` counts them).
    """

    def __init__(self, parent: grain.IterDataset, seq_len: int, max_segments: int):
        super().__init__(parent)
        self._seq_len, self._max_segments = seq_len, max_segments

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(self._parent.__iter__(), self._seq_len, self._max_segments)


class _PackIterator(grain.DatasetIterator):
    """State: the parent's state before the current document, and how much of it is in rows."""

    def __init__(self, parent: grain.DatasetIterator, seq_len: int, max_segments: int):
        super().__init__(parent)
        self._seq_len, self._max_segments = seq_len, max_segments
        self._arange = np.arange(seq_len, dtype=np.int32)
        self._document, self._used = None, 0
        self._state_before = parent.get_state()

    def __next__(self) -> dict[str, np.ndarray]:
        T = self._seq_len
        tokens, targets, segment_ids, positions = np.zeros((4, T), np.int32)
        loss_weights = np.zeros(T, np.float32)
        filled = segment = segment_start = 0
        while filled < T:
            if self._document is None and not self._take_document():
                if filled == 0:
                    raise StopIteration
                piece, following = np.zeros(T - filled, np.int32), ()  # padding
            else:
                piece = self._document[self._used : self._used + T - filled]
                following = self._document[self._used + 1 : self._used + 1 + len(piece)]
            if segment < self._max_segments:
                segment, segment_start = segment + 1, filled
            end = filled + len(piece)
            tokens[filled:end] = piece
            targets[filled : filled + len(following)] = following
            loss_weights[filled : filled + len(following)] = 1.0
            segment_ids[filled:end] = segment
            positions[filled:end] = self._arange[filled - segment_start : end - segment_start]
            filled = end
            if self._document is not None:
                self._used += len(piece)
                if self._used == len(self._document):
                    self._document = None
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_weights": loss_weights,
            "segment_ids": segment_ids,
            "positions": positions,
        }

    def _take_document(self) -> bool:
        self._state_before, self._used = self._parent.get_state(), 0
        self._document = next(self._parent, None)
        return self._document is not None

    def get_state(self) -> dict[str, Any]:
        if self._document is None:
            return {"parent": self._parent.get_state(), "used": 0}
        return {"parent": self._state_before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._document = None
        if state["used"]:
            if not self._take_document() or state["used"] >= len(self._document):
                raise BadInput(
                    "the checkpoint's position is not in this corpus, which was prepared again "
                    "since: restore the corpus, or choose another workdir"
                )
            self._used = state["used"]
