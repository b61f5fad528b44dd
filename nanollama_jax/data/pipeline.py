"""Prepared documents -> packed batches, with Grain: shuffle each source, pack it into rows, shuffle those, mix by weight, batch, prefetch.

A batch is a flat dict of (B, T) arrays, the only thing that passes from data to training:

    tokens        int32    BOS document EOS, BOS document EOS, ... cut wherever a row ends; the next row goes on with the rest
    targets       int32    the next token of the same document
    loss_weights  float32  0 where nothing is learnt: at EOS, whose next token is another document's, and at padding
    segment_ids   int32    documents numbered from 1 within a row; padding is a segment of its own (unless the row already has max_segments)
    positions     int32    position within the segment, from 0

Each source has its own endless order of documents, which no weight and no other source changes: the stages of a curriculum go on in it where the
last one stopped (`positions`). Weights are shares of rows, hence of tokens, however long a source's documents are. Every process assembles the
whole global batch and places only its own rows (`sharding.put_batch`): packing is far faster than training, and so the order of rows, and the
iterator's state in a checkpoint, depend on neither the number of processes nor of devices.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import zlib
from collections.abc import Mapping
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

# Rows of a source that are shuffled among each other after packing, for rows of up to 4,096 tokens; longer ones go by tokens, for the sake of memory.
SHUFFLE_ROWS = 512
# Per source. 1, 4 and 16 threads pack 6.7, 5.5 and 3.7M tokens/s of documents of 2,800 tokens, and 0.4, 0.6 and 0.2M/s of 85 (two cores).
READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=128)


@dataclasses.dataclass(frozen=True)
class Source:
    """One prepared corpus, its shards found whole and its tokens known to be this tokenizer's."""

    name: str
    directory: pathlib.Path
    manifest: dict[str, Any]

    def tokens(self, split: str) -> int:
        """Tokens on disk; of documents without BOS and EOS."""
        return self.manifest["splits"][split]["tokens"]


def open_source(
    directory: str | pathlib.Path, name: str, tokenizer: Tokenizer, kind: str = "documents"
) -> Source:
    """`kind`: documents, conversations or preferences. Raises BadInput for a missing corpus, one of another kind or tokenised by another tokenizer,
    or a missing or truncated shard."""
    directory = pathlib.Path(directory) / name
    manifest = load_manifest(directory)
    if (found := manifest.get("kind", "documents")) != kind:
        raise BadInput(
            f"{directory} holds {found} and this stage trains on {kind}: name another source in data.sources"
        )
    if manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise BadInput(
            f"{directory} was tokenised with another tokenizer (sha256 {manifest['tokenizer_sha256'][:12]}, this one is {tokenizer.sha256[:12]}): "
            "set tokenizer.path to that one, or prepare into another data.dir"
        )
    if manifest["dtype"] != (
        stored := dtype_for(tokenizer.vocab_size) if kind == "documents" else "uint32"
    ):
        raise BadInput(
            f"{directory / MANIFEST} has dtype={manifest['dtype']} where {kind} are stored in {stored}: restore it from a copy"
        )
    verify_shards(directory, manifest)
    return Source(name, directory, manifest)


def fingerprint(sources: Mapping[str, Source]) -> str:
    """sha256 over the manifests, checksums of all shards included: names the data a checkpoint was trained on."""
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
    """Endless global batches of the sources in `weights`. Iterators have get_state and set_state; a state holds for the same
    `windows` alone (source -> rows that are shuffled among each other; the longest without).
    """
    check_weights(sources, weights)
    shuffled = {}
    for name in sorted(weights):
        packed = packed_rows(
            sources[name], tokenizer, seq_len=seq_len, max_segments=max_segments, seed=seed
        )
        # A long document fills many rows in a row: without this a batch could be one book.
        window = windows[name] if windows else shuffle_window(seq_len)
        shuffled[name] = grain.experimental.WindowShuffleIterDataset(
            packed, window_size=window, seed=own_seed(seed, name)
        )
    mixed = grain.IterDataset.mix(shuffled, {name: weights[name] for name in shuffled})
    return grain.experimental.ThreadPrefetchIterDataset(
        mixed.batch(batch_size), prefetch_buffer_size=2
    )


def check_weights(sources: Mapping[str, Source], weights: Mapping[str, float]) -> None:
    """Raises BadInput for a weight or a source that nothing can be drawn by."""
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise BadInput(
                f"data.sources.{name}={weight}: a weight must be above 0; leave the source out instead"
            )
        if not sources[name].tokens("train"):
            raise BadInput(
                f"source {name!r} has no training documents: give it more text, or leave it out of data.sources"
            )


def shuffle_window(seq_len: int, rows: int | None = None) -> int:
    """How many rows of a source are shuffled among each other, of `rows` that a stage reads of it.

    A stage of a few windows ends just after one, for the next begins with the window in hand: the nano curriculum would read one all over again.
    """
    window = min(SHUFFLE_ROWS, max(1, SHUFFLE_ROWS * 4096 // seq_len))
    if rows is None or rows >= 8 * window:
        return window
    rows = max(1, rows - 2)  # the mix is within a row of the shares
    return rows // -(-rows // window)


def shuffle_windows(weights: Mapping[str, float], seq_len: int, rows: int) -> dict[str, int]:
    """source -> its shuffle window in a stage that reads `rows` of all sources together."""
    total = sum(weights.values())
    return {
        name: shuffle_window(seq_len, int(rows * weight / total))
        for name, weight in weights.items()
    }


def positions(state: dict[str, Any], sources: Mapping[str, Source], seed: int) -> dict[str, Any]:
    """source -> where it stands in which order, from the state of an iterator of `train_batches`: the first document of the window in hand."""
    starts = {
        name: parent["parent_window_start_state"] for name, parent in state["parents"].items()
    }
    return {
        name: {"at": start, "seed": seed, "corpus": fingerprint({name: sources[name]})}
        for name, start in starts.items()
    }


def begin_at(
    state: dict[str, Any], positions: Mapping[str, Any], sources: Mapping[str, Source], seed: int
) -> tuple[dict[str, Any], list[str]]:
    """The state of a new iterator with its sources at `positions`, whatever weights and row length they were read with: no document is skipped,
    and at most the rows of one window are read again. Sources without a position keep their beginning, and so do those, named, whose position is
    in another order: of another seed, or prepared anew.
    """
    parents, anew = dict(state["parents"]), []
    for name in parents.keys() & positions.keys():
        if (positions[name]["seed"], positions[name]["corpus"]) == (
            seed,
            fingerprint({name: sources[name]}),
        ):
            parents[name] = parents[name] | {"parent_window_start_state": positions[name]["at"]}
        else:
            anew.append(name)
    return state | {"parents": parents}, sorted(anew)


def own_seed(seed: int, name: str) -> int:
    return (seed + zlib.crc32(name.encode())) % 2**31  # Grain's shuffles take 32 bits


def packed_rows(
    source: Source, tokenizer: Tokenizer, *, seq_len: int, max_segments: int, seed: int
) -> grain.IterDataset:
    """Endless rows of the training documents in shuffled order, each epoch in another; a document's rows follow each other."""
    documents = (
        _documents(source, "train", tokenizer).seed(own_seed(seed, source.name)).shuffle().repeat()
    )
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
    """`max_rows` rows of the validation split, always the same, as whole batches; the last is filled up with rows that weigh nothing."""
    if not source.tokens("validation"):
        raise BadInput(
            f"source {source.name!r} has no validation documents: raise data.validation_fraction and prepare it again"
        )
    documents = (
        _documents(source, "validation", tokenizer)
        .seed(0)
        .shuffle()
        .to_iter_dataset(grain.ReadOptions(num_threads=1))
    )
    packed = PackIterDataset(documents, seq_len, max_segments)
    rows = []
    for row in grain.experimental.WindowShuffleIterDataset(
        packed, window_size=shuffle_window(seq_len), seed=0
    ):  # else they are of few documents
        rows.append(row)
        if len(rows) == max_rows:
            break
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    rows += [empty] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[i : i + batch_size]]) for name in empty}
        for i in range(0, len(rows), batch_size)
    ]


def merged_documents(batch: Batch, bos_id: int) -> int:
    """How many documents of a batch share a segment with another because their row already held `max_segments`."""
    return int(np.sum((batch["tokens"] == bos_id) & (batch["positions"] > 0)))


def _documents(source: Source, split: str, tokenizer: Tokenizer) -> grain.MapDataset:
    """Documents as int32 arrays, BOS and EOS added."""
    dtype = np.dtype(source.manifest["dtype"])
    bos, eos = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    return grain.MapDataset.source(_Records(source, split)).map(
        lambda record: np.concatenate([bos, np.frombuffer(record, dtype), eos])
    )


class _Records:
    """The records of a split by number, for Grain; damage to one names its shard."""

    def __init__(self, source: Source, split: str):
        self._shards = split_shards(source.directory, source.manifest, split)
        self._ends = np.cumsum(
            [shard["documents"] for shard in source.manifest["splits"][split]["shards"]]
        )
        with naming_shard(source.directory / f"{split}-*"):  # which of them is not said
            self._records = grain.sources.ArrayRecordDataSource(
                [str(path) for path in self._shards]
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> bytes:
        with naming_shard(
            self._shards[
                min(int(np.searchsorted(self._ends, number, side="right")), len(self._shards) - 1)
            ]
        ):
            return self._records[number]


class PackIterDataset(grain.IterDataset):
    """Concat-then-split: documents laid end to end and cut into rows of `seq_len`; nothing is dropped and only a finite stream's last row is padded.

    A row holds at most `max_segments` segments (packed attention kernels need a static bound): what would be one more is merged into the last,
    as if it were one document with it (`merged_documents` counts them).
    """

    def __init__(self, parent: grain.IterDataset, seq_len: int, max_segments: int):
        super().__init__(parent)
        self._seq_len, self._max_segments = seq_len, max_segments

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(self._parent.__iter__(), self._seq_len, self._max_segments)


class _PackIterator(grain.DatasetIterator):
    """State: the parent's state before the document in hand, and how many of its tokens are already in rows."""

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
                    "the checkpoint's position is not in this corpus: it was prepared anew since; restore it, or choose another workdir"
                )
            self._used = state["used"]
