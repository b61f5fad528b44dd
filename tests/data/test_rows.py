"""Packing whole conversations and pairs.

Nothing is lost, doubled or split, rows follow their contract, and the stream resumes exactly.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax.corpus.finetuning import SAID
from nanollama_jax.data.pipeline import Source
from nanollama_jax.data.rows import Rows, best_fit, train_batches
from nanollama_jax.errors import BadInput

SIDE = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=12)


def as_side(tokens: list[tuple[int, bool]]) -> np.ndarray:
    return np.array([token | (int(SAID) if learned else 0) for token, learned in tokens], np.uint32)


def rows_of(
    units: list[list[list[tuple[int, bool]]]], seq_len: int, max_segments: int, first_pair: int = 0
) -> Rows:
    pairs = len(units[0]) == 2
    made = [[as_side(side) for side in unit] for unit in units]
    bins = best_fit(
        [sum(map(len, unit)) for unit in made],
        seq_len,
        max_segments // 2 if pairs else max_segments,
    )
    return Rows(made, bins, seq_len, max_segments, pairs, first_pair)


# ---- Best fit


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_best_fit_is_best_fit(data):
    """By a replay: each unit is in the fullest bin that had room, a new one only if none had."""
    capacity, max_units = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit(lengths, capacity, max_units)
    assert sorted(index for each in bins for index in each) == list(range(len(lengths))), (
        "nothing is lost or doubled"
    )
    bin_of = {index: number for number, each in enumerate(bins) for index in each}
    room, free = {}, {}  # of the bins that are open
    for index, length in enumerate(lengths):
        number = bin_of[index]
        fitting = [room[other] for other in room if room[other] >= length and free[other]]
        if number in room:
            assert free[number] and room[number] == min(fitting)
        else:
            assert not fitting and number == len(room), (
                "a new bin, the next, where it fits into none"
            )
            room[number], free[number] = capacity, max_units
        room[number], free[number] = room[number] - length, free[number] - 1
    assert all(0 <= room[number] < capacity and free[number] >= 0 for number in range(len(bins)))
    if max_units >= len(
        lengths
    ):  # Johnson et al. 1974: at most 1.7 times what there must be, and one
        assert (
            len(bins) <= 1.7 * math.ceil(sum(lengths) / capacity) + 1
            or sum(length * 2 > capacity for length in lengths) > 1
        )


def test_best_fit_of_many():
    lengths = np.random.default_rng(0).integers(20, 2000, 20_000).tolist()
    assert len(best_fit(lengths, 4096, 64)) < 1.02 * sum(lengths) / 4096


# ---- Rows


def check_rows(rows: Rows, units) -> None:
    """Token by token, against what the units say."""
    seen = []
    for number in range(len(rows)):
        row, segment, at = rows[number], 0, 0
        assert {
            name: (array.dtype, len(array)) for name, array in row.items() if name != "pairs"
        } == {
            **{
                name: (np.dtype(np.int32), rows.seq_len)
                for name in ("tokens", "targets", "segment_ids", "positions")
            },
            "loss_weights": (np.dtype(np.float32), rows.seq_len),
        }
        for index in rows.bins[number]:
            seen.append(index)
            for side in units[index]:
                segment += 1
                for i, (token, _) in enumerate(side):
                    assert (row["tokens"][at], row["segment_ids"][at], row["positions"][at]) == (
                        token,
                        segment,
                        i,
                    )
                    following = side[i + 1] if i + 1 < len(side) else (None, False)
                    assert row["loss_weights"][at] == following[1], (
                        "the loss is on SAID tokens, never on the first of another document"
                    )
                    assert not following[1] or row["targets"][at] == following[0]
                    at += 1
        assert segment <= rows.max_segments
        padding = slice(at, None)
        assert not row["loss_weights"][padding].any() and not row["tokens"][padding].any()
        assert set(row["segment_ids"][padding]) <= {min(segment + 1, rows.max_segments)}
        assert row["positions"][padding].tolist() == list(range(rows.seq_len - at))
        if rows.pairs:
            empty = rows.max_segments // 2 - len(rows.bins[number])
            assert (
                row["pairs"].tolist()
                == [rows.first_pair + index for index in rows.bins[number]] + [-1] * empty
            )
            assert row["pairs"].dtype == np.int32
    assert sorted(seen) == list(range(len(units))), "every unit is in one row, whole"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(SIDE, min_size=1, max_size=1), min_size=1, max_size=12),
    st.integers(12, 40),
    st.integers(1, 6),
)
def test_rows_of_conversations(units, seq_len, max_segments):
    check_rows(rows_of(units, seq_len, max_segments), units)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(SIDE, min_size=2, max_size=2), min_size=1, max_size=12),
    st.integers(24, 60),
    st.integers(2, 7),
    st.integers(0, 1000),
)
def test_rows_of_pairs(units, seq_len, max_segments, first_pair):
    check_rows(rows_of(units, seq_len, max_segments, first_pair), units)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 2).flatmap(
        lambda sides: st.lists(
            st.lists(SIDE, min_size=sides, max_size=sides), min_size=1, max_size=12
        )
    ),
    st.integers(1, 5),
    st.one_of(st.just(math.inf), st.integers(1, 9)),
)
def test_batches_are_filled_up_with_rows_that_weigh_nothing(units, batch_size, max_rows):
    rows = rows_of(units, 30, 4)
    batches, count = list(rows.batches(batch_size, max_rows)), int(min(max_rows, len(rows)))
    assert len(batches) == -(-count // batch_size) and all(
        len(array) == batch_size for batch in batches for array in batch.values()
    )
    for at in range(len(batches) * batch_size):
        found = {name: array[at % batch_size] for name, array in batches[at // batch_size].items()}
        if at < count:
            assert all(np.array_equal(found[name], array) for name, array in rows[at].items())
        else:
            assert not found["loss_weights"].any() and (
                not rows.pairs or set(found["pairs"]) == {-1}
            )


def test_fill_and_longer_sources(tmp_path):
    rows = rows_of([[[(1, False), (2, True)]], [[(1, False), (2, True), (3, True)]]], 10, 4)
    assert (len(rows), rows.fill) == (1, 0.5)
    with pytest.raises(BadInput, match="prepared for rows of 20 tokens"):
        Rows.of(
            Source("x", tmp_path, {"max_tokens": 20, "kind": "conversations"}),
            "train",
            seq_len=10,
            max_segments=4,
        )


# ---- The stream


def stream(seed: int = 0):
    rng = np.random.default_rng(0)
    made = {}
    for name, first, count in (
        ("few", 1000, 7),
        ("many", 2000, 23),
    ):  # ids tell the source and the unit
        units = [
            [[(first + number, False)] + [(first + number, True)] * int(length)]
            for number, length in enumerate(rng.integers(3, 9, count))
        ]
        made[name] = rows_of(units, 10, 4)
    return made, train_batches(made, {"few": 0.25, "many": 0.75}, batch_size=4, seed=seed)


@pytest.mark.parametrize("taken", [0, 1, 5, 13])
def test_the_stream_goes_on_where_it_was(taken):
    iterator = iter(stream()[1])
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(12)]
    resumed = iter(stream()[1])
    resumed.set_state(state)
    for batch in expected:
        found = next(resumed)
        assert found.keys() == batch.keys() and all(
            np.array_equal(found[name], batch[name]) for name in batch
        )


def test_epochs_read_every_row_once_in_another_order():
    made, batches = stream()
    iterator = iter(batches)
    rows = np.concatenate([next(iterator)["tokens"] for _ in range(40)])
    for name, first, share in (("few", 1000, 0.25), ("many", 2000, 0.75)):
        length = len(made[name])
        mine = [tuple(row) for row in rows if first <= row[0] < first + 1000]
        assert abs(len(mine) - share * len(rows)) <= 1
        epochs = [mine[i : i + length] for i in range(0, len(mine) - length + 1, length)]
        assert len(epochs) >= 3
        assert all(
            sorted(epoch) == sorted(tuple(made[name][i]["tokens"]) for i in range(length))
            for epoch in epochs
        )
        assert len(set(map(tuple, epochs))) == len(epochs)
    other = next(iter(stream(seed=1)[1]))["tokens"]
    assert not np.array_equal(other, rows[:4])
