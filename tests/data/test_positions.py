"""Stages of a curriculum resume each source where the previous stage stopped.

Whatever their weights, row lengths and other sources.
"""

import json

import numpy as np
import pytest

from nanollama_jax.corpus.prepare import prepare_source, train_tokenizer_for
from nanollama_jax.data import pipeline
from nanollama_jax.tokenizer import Tokenizer

STAGES = [
    ({"a": 0.5, "b": 0.5}, 32, 300),
    ({"a": 0.9, "b": 0.1}, 64, 100),
    ({"b": 1.0}, 64, 40),
    ({"a": 0.2, "c": 0.8}, 128, 60),
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name in "abc":
        texts = [
            " ".join(f"{name}{i}.{j} then more" for j in range(1 + i * 37 % 60))
            for i in range(1500)
        ]
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    train_tokenizer_for(
        [f"file://{root}/{name}.jsonl" for name in "abc"], root / "t.model", 290, 100_000
    )
    for name in "abc":
        prepare_source(
            name,
            f"file://{root}/{name}.jsonl",
            "none",
            root / name,
            root / "t.model",
            validation_fraction=0.01,
            tasks=1,
        )
    tokenizer = Tokenizer(root / "t.model")
    return {name: pipeline.open_source(root, name, tokenizer) for name in "abc"}, tokenizer


def test_changed_weights_lose_no_position_in_any_source(corpora, monkeypatch):
    monkeypatch.setattr(pipeline, "SHUFFLE_ROWS", 8)
    sources, tokenizer = corpora
    streams = {name: stream_of(source, tokenizer) for name, source in sources.items()}
    read_before, covered, rows_read = (
        {},
        {name: np.zeros(len(tokens), int) for name, (tokens, _) in streams.items()},
        dict.fromkeys("abc", 0),
    )
    for weights, seq_len, rows in STAGES:
        batches = iter(
            pipeline.train_batches(
                sources, weights, tokenizer, batch_size=1, seq_len=seq_len, max_segments=64, seed=0
            )
        )
        state, restarted = pipeline.resume_at(
            batches.get_state(), json.loads(json.dumps(read_before)), sources, seed=0
        )  # as a checkpoint keeps it
        assert not restarted
        batches.set_state(state)
        for _ in range(rows):
            tokens = next(batches)["tokens"][0]
            name = source_of(tokens, tokenizer)
            at = streams[name][0].tobytes().index(tokens.tobytes()) // tokens.itemsize
            covered[name][at : at + seq_len] += 1
            rows_read[name] += 1
        read_before |= pipeline.positions(batches.get_state(), sources, seed=0)
        batches.close()
    assert min(rows_read.values()) > 40
    for name, (_, starts) in streams.items():
        stands_at = starts[read_before[name]["at"]["parent"]["next_index"]]
        assert stands_at > 1000
        assert covered[name][:stands_at].min() >= 1  # nothing was skipped
        longest_window = 8 * 128 + max(np.diff(starts))
        assert not covered[name][stands_at + longest_window :].any()
        # And little is read again: the part of its last window that a stage had read.
        assert np.sum(covered[name] > 1) < (len(STAGES) - 1) * longest_window


def test_a_stage_of_few_rows_still_moves_on(corpora):
    sources, tokenizer = corpora
    read_before, tokens, weights = {}, [], {"a": 0.5, "b": 0.5}
    for seq_len, rows in [
        (32, 320),
        (64, 90),
        (128, 40),
        (32, 200),
    ]:  # none has a window of 512 rows
        batches = iter(
            pipeline.train_batches(
                sources,
                weights,
                tokenizer,
                batch_size=1,
                seq_len=seq_len,
                max_segments=64,
                seed=0,
                windows=pipeline.shuffle_windows(weights, seq_len, rows),
            )
        )
        batches.set_state(pipeline.resume_at(batches.get_state(), read_before, sources, seed=0)[0])
        tokens += [next(batches)["tokens"][0] for _ in range(rows)]
        read_before |= pipeline.positions(batches.get_state(), sources, seed=0)
        batches.close()
    for name in "ab":
        stream, starts = stream_of(sources[name], tokenizer)
        covered = np.zeros(len(stream), int)
        for row in tokens:
            if source_of(row, tokenizer) == name:
                at = stream.tobytes().index(row.tobytes()) // row.itemsize
                covered[at : at + len(row)] += 1
        stands_at = starts[read_before[name]["at"]["parent"]["next_index"]]
        assert covered[:stands_at].min() >= 1
        # At a stage's end, a row or two are of the window that restarts, and so is the document
        # that it starts in.
        assert np.sum(covered > 1) < 3 * (3 * 128 + max(np.diff(starts))) < 0.3 * covered.sum()


def test_positions_in_another_order_are_not_used(corpora):
    sources, tokenizer = corpora
    windows = pipeline.shuffle_windows({"a": 1.0, "b": 1.0}, 64, 64)
    batches = iter(
        pipeline.train_batches(
            sources,
            {"a": 1.0, "b": 1.0},
            tokenizer,
            batch_size=8,
            seq_len=64,
            max_segments=64,
            seed=0,
            windows=windows,
        )
    )
    for _ in range(8):
        next(batches)
    state, fresh = batches.get_state(), pipeline.positions(batches.get_state(), sources, seed=0)
    batches.close()
    assert pipeline.resume_at(state, fresh, sources, seed=1)[1] == ["a", "b"]
    other = fresh | {"b": fresh["b"] | {"corpus": "another"}}
    assert pipeline.resume_at(state, other, sources, seed=0)[1] == ["b"]
    assert pipeline.resume_at(state, {"c": fresh["a"]}, sources, seed=0) == (state, [])


@pytest.mark.parametrize(
    ("rows", "window"),
    [(None, 512), (10**6, 512), (4096, 512), (4095, 511), (960, 479), (320, 318), (2, 1), (0, 1)],
)
def test_shuffle_windows(rows, window):
    assert pipeline.shuffle_window(4096, rows) == window


def test_another_source_or_weight_does_not_change_a_sources_order(corpora):
    sources, tokenizer = corpora
    seen = []
    for weights in ({"b": 1.0}, {"a": 0.7, "b": 0.3}, {"a": 1.0, "b": 2.0, "c": 1.0}):
        batches = iter(
            pipeline.train_batches(
                sources, weights, tokenizer, batch_size=1, seq_len=64, max_segments=64, seed=0
            )
        )
        rows = [next(batches)["tokens"][0] for _ in range(300)]
        seen.append([bytes(row) for row in rows if source_of(row, tokenizer) == "b"][:60])
        batches.close()
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 60


def source_of(tokens, tokenizer) -> str:
    return next(character for character in tokenizer.decode(tokens.tolist()) if character in "abc")


def stream_of(source, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The first epoch's documents end to end, and where each starts."""
    documents = (
        pipeline._documents(source, "train", tokenizer)
        .seed(pipeline.source_seed(0, source.name))
        .shuffle()
    )
    arrays = [documents[i] for i in range(len(documents))]
    return np.concatenate(arrays), np.cumsum([0] + [len(array) for array in arrays])
