"""Batches of synthetic documents, with lengths like those of real text.

Packed into rows like data/pipeline.py, and the same every time.
"""

from collections.abc import Iterable

import numpy as np

BOS_ID, EOS_ID, FIRST_ID = 1, 2, 3
MEAN_LENGTH = 1000  # tokens of a web page or a source file
MAX_SEGMENTS = 64


def draw_batches(
    count: int, rows: int, seq_len: int, vocab_size: int, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """`count` batches of `rows` rows of synthetic documents, BOS and EOS included.

    Lengths are log-normal (sigma 1) with a mean of 1,000. In rows longer than 4,096, half of the
    tokens belong to documents that fill the row, as in phase 2. Ids are log-uniform, so that
    frequent ones are as frequent as in text, which affects the embedding's gradient.
    """
    rng = np.random.default_rng(seed)
    wanted, documents = count * rows * seq_len, []
    of_kind = [0, 0]  # tokens of short documents, and of long ones
    while sum(of_kind) < wanted:
        long = seq_len > 4096 and of_kind[1] < of_kind[0]
        length = max(3, int(rng.lognormal(np.log(2 * seq_len if long else MEAN_LENGTH) - 0.5)))
        length = max(length, seq_len) if long else min(length, seq_len)
        ids = np.exp(rng.uniform(np.log(FIRST_ID), np.log(vocab_size), length)).astype(np.int32)
        ids[0], ids[-1] = BOS_ID, EOS_ID
        documents.append(ids)
        of_kind[long] += length
    packed = pack(documents, seq_len)
    order = rng.permutation(count * rows).reshape(count, rows)
    return [{name: array[chosen] for name, array in packed.items()} for chosen in order]


def pack(documents: Iterable[np.ndarray], seq_len: int) -> dict[str, np.ndarray]:
    """All full rows of the documents, laid end to end: a batch of (rows, seq_len) arrays."""
    documents = list(documents)
    rows = sum(map(len, documents)) // seq_len
    cut = slice(rows * seq_len)
    stream = np.concatenate(documents)
    starts = np.zeros(len(stream), bool)
    ends = np.zeros(len(stream), bool)
    end_of = np.cumsum([len(document) for document in documents])
    ends[end_of - 1] = True
    starts[0], starts[end_of[:-1]] = True, True
    starts, ends = (marks[cut].reshape(rows, seq_len) for marks in (starts, ends))
    targets = np.append(stream[1:], 0)[cut].reshape(rows, seq_len)
    starts[:, 0] = True
    starts &= np.cumsum(starts, axis=1) <= MAX_SEGMENTS
    column = np.broadcast_to(np.arange(seq_len), starts.shape)
    segment_start = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return {
        "tokens": stream[cut].reshape(rows, seq_len).astype(np.int32),
        "targets": np.where(ends, 0, targets).astype(np.int32),
        "loss_weights": (~ends).astype(np.float32),
        "segment_ids": np.cumsum(starts, axis=1).astype(np.int32),
        "positions": (column - segment_start).astype(np.int32),
    }


def squared_lengths(segment_ids_BT: np.ndarray) -> int:
    """sum(len^2) over the documents in the rows: the cost of attention within them."""
    return sum(
        int((np.unique(row, return_counts=True)[1].astype(np.int64) ** 2).sum())
        for row in segment_ids_BT
    )


def mean_context(segment_ids_BT: np.ndarray) -> float:
    """sum(len^2) / sum(len) over the documents in the rows.

    It takes the place of the row length in attention's FLOPs when documents are masked.
    """
    return squared_lengths(segment_ids_BT) / segment_ids_BT.size
