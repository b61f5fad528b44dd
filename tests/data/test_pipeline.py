"""Packing loses and doubles nothing, batches follow their contract, iterators resume exactly."""

import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax.corpus.prepare import prepare_source, train_tokenizer_for
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

BOS, EOS = 1, 2


def documents_of(lengths):
    """BOS, distinct ids, EOS."""
    start, documents = 3, []
    for n in lengths:
        documents.append(np.array([BOS, *range(start, start + n), EOS], np.int32))
        start += n
    return documents


def pack(documents, seq_len, max_segments):
    return pipeline.PackIterDataset(
        grain.MapDataset.source(documents).to_iter_dataset(), seq_len, max_segments
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    seq_len=st.integers(1, 50),
    max_segments=st.integers(1, 6),
)
def test_no_token_is_lost_or_doubled_and_no_target_crosses_documents(
    lengths, seq_len, max_segments
):
    documents = documents_of(lengths)
    rows = list(pack(documents, seq_len, max_segments))
    stream = np.concatenate(documents)
    flat = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    np.testing.assert_array_equal(flat["tokens"][: len(stream)], stream)
    assert len(flat["tokens"]) - len(stream) < seq_len and not flat["tokens"][len(stream) :].any()
    # every token but BOS is a learned target exactly once, that of the token before it
    learned = flat["loss_weights"] == 1
    np.testing.assert_array_equal(flat["targets"][learned], stream[stream != BOS])
    np.testing.assert_array_equal(np.flatnonzero(learned), np.flatnonzero(stream != EOS))
    assert set(flat["loss_weights"]) <= {0.0, 1.0}
    merged = 0
    for row in rows:
        segments, positions = row["segment_ids"], row["positions"]
        assert (
            segments[0] == 1 and segments.max() <= max_segments and set(np.diff(segments)) <= {0, 1}
        )
        for i in range(1, segments.max() + 1):
            np.testing.assert_array_equal(
                positions[segments == i], np.arange((segments == i).sum())
            )
        starts = np.flatnonzero(row["tokens"] == BOS)
        merged += sum(positions[start] > 0 for start in starts)
        if (
            len(starts) + 2 <= max_segments
        ):  # room for a first piece and for padding: then each document has its own segment
            assert (positions[starts] == 0).all()
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert pipeline.merged_documents(batch, BOS) == merged


def test_padding_is_its_own_segment_and_weighs_nothing():
    (row,) = pack(documents_of([3, 2]), 16, 8)
    assert row["segment_ids"].tolist() == [1] * 5 + [2] * 4 + [3] * 7
    assert not row["loss_weights"][9:].any() and row["positions"][9:].tolist() == list(range(7))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=5, max_size=20),
    seq_len=st.integers(3, 30),
    taken=st.integers(0, 10),
)
def test_packer_resumes_at_any_row(lengths, seq_len, taken):
    iterator = iter(pack(documents_of(lengths), seq_len, 4))
    for _ in range(taken):
        next(iterator, None)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    resumed = iter(pack(documents_of(lengths), seq_len, 4))
    resumed.set_state(state)
    assert_same(rest, list(resumed))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two prepared sources in separate alphabets, of many short and of few long documents.

    And their tokenizer.
    """
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, alphabet, lengths in (
        ("short", "abcdefghij", rng.integers(5, 60, 400)),
        ("long", "klmnopqrst", rng.integers(500, 3000, 40)),
    ):
        words = ["".join(rng.choice(list(alphabet), 6)) + " " for _ in range(400)]
        texts = ["".join(rng.choice(words, n)) + str(i) for i, n in enumerate(lengths)]
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    path = root / "tokenizer.model"
    train_tokenizer_for(
        [f"file://{root}/short.jsonl", f"file://{root}/long.jsonl"], path, 512, 10**6
    )
    for name in ("short", "long"):
        prepare_source(
            name,
            f"file://{root}/{name}.jsonl",
            "none",
            root / name,
            path,
            validation_fraction=0.1,
            tasks=1,
        )
    return root, Tokenizer(path)


def open_both(corpus):
    root, tokenizer = corpus
    return {
        name: pipeline.open_source(root, name, tokenizer) for name in ("short", "long")
    }, tokenizer


def batches_of(corpus, weights, seed=0, batch_size=4, seq_len=128):
    sources, tokenizer = open_both(corpus)
    return pipeline.train_batches(
        sources,
        weights,
        tokenizer,
        batch_size=batch_size,
        seq_len=seq_len,
        max_segments=8,
        seed=seed,
    )


def source_of(row, tokenizer):
    letters = set(tokenizer.decode(row["tokens"].tolist())) - set(" 0123456789")
    assert letters <= set("abcdefghij") or letters <= set("klmnopqrst"), "a row holds one source"
    return "short" if "a" in letters else "long"


def test_weights_are_shares_of_rows(corpus):
    batches = iter(batches_of(corpus, {"short": 0.25, "long": 0.75}))
    rows = [
        {name: array[i] for name, array in batch.items()}
        for batch in (next(batches) for _ in range(100))
        for i in range(4)
    ]
    share = np.mean([source_of(row, corpus[1]) == "short" for row in rows])
    assert abs(share - 0.25) < 0.01


def test_an_epoch_has_every_document_once_and_the_next_another_order(corpus):
    sources, tokenizer = open_both(corpus)
    length = sources["short"].manifest["splits"]["train"]["documents"]
    tokens = sources["short"].tokens("train") + 2 * length
    rows, seen = (
        iter(
            pipeline.packed_rows(sources["short"], tokenizer, seq_len=100, max_segments=8, seed=0)
        ),
        [],
    )
    while sum(map(len, seen)) < 2 * tokens:
        seen.append(next(rows)["tokens"])
    stream = np.concatenate(seen)
    first, second = (
        np.split(part, np.flatnonzero(part == EOS) + 1)[:length]
        for part in (stream[:tokens], stream[tokens:])
    )
    assert (
        sorted(map(bytes, first)) == sorted(map(bytes, second))
        and len({bytes(d) for d in first}) == length
    )
    assert list(map(bytes, first)) != list(map(bytes, second))


@pytest.mark.parametrize("taken", [0, 1, 37, 128, 600])  # a window of shuffled rows is 128 batches
def test_batches_resume_exactly_with_prefetch_and_mixing(corpus, taken):
    weights = {"short": 0.3, "long": 0.7}
    iterator = iter(batches_of(corpus, weights))
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(20)]
    resumed = iter(batches_of(corpus, weights))
    resumed.set_state(state)
    assert_same(rest, [next(resumed) for _ in range(20)])


def test_a_batch_is_not_one_long_document(corpus):
    batch = next(iter(batches_of(corpus, {"long": 1.0}, batch_size=8, seq_len=32)))
    assert len({bytes(row) for row in batch["tokens"] // 1}) == 8
    starts_within_a_document = (batch["tokens"][:, 0] != BOS).sum()
    sources, tokenizer = open_both(corpus)
    rows = iter(
        pipeline.packed_rows(sources["long"], tokenizer, seq_len=32, max_segments=8, seed=0)
    )
    in_order = [next(rows)["tokens"] for _ in range(8)]
    assert starts_within_a_document >= 7 and any(
        (row != batch["tokens"][i]).any() for i, row in enumerate(in_order)
    )


def test_seeds_of_the_longest_curriculum_are_taken(corpus):
    next(iter(batches_of(corpus, {"short": 1.0, "long": 1.0}, seed=2**31 - 1)))


def test_seed_decides_the_order(corpus):
    a, b, c = (next(iter(batches_of(corpus, {"long": 1.0}, seed=seed))) for seed in (0, 0, 1))
    assert_same([a], [b])
    assert (a["tokens"] != c["tokens"]).any()


def test_validation_rows_are_whole_batches_and_held_out(corpus):
    sources, tokenizer = open_both(corpus)
    options = dict(batch_size=3, seq_len=64, max_segments=8, max_rows=10)
    batches = pipeline.validation_batches(sources["short"], tokenizer, **options)
    assert all(array.shape == (3, 64) for batch in batches for array in batch.values())
    assert_same(batches, pipeline.validation_batches(sources["short"], tokenizer, **options))
    held_out = {tokenizer.decode(row.tolist()) for batch in batches for row in batch["tokens"]}
    trained = tokenizer.decode(
        np.concatenate(
            [next(iter(batches_of(corpus, {"short": 1.0}, batch_size=256)))["tokens"].ravel()]
        ).tolist()
    )
    assert not any(text.strip() and text[-60:] in trained for text in held_out)


def test_a_position_of_another_corpus_is_refused(corpus):
    batches = iter(batches_of(corpus, {"short": 1.0}))
    state = batches.get_state()
    state["parents"]["short"]["parent_window_start_state"]["used"] = 10**6
    with pytest.raises(BadInput, match="which was prepared again"):
        batches.set_state(state)
    batches.close()


def test_bad_sources_are_refused(corpus, tmp_path):
    root, tokenizer = corpus
    with pytest.raises(BadInput, match="is not prepared"):
        pipeline.open_source(root, "absent", tokenizer)
    other = tmp_path / "other.model"
    train_tokenizer_for([f"file://{root}/long.jsonl"], other, 400, 10**6)
    with pytest.raises(BadInput, match="another tokenizer"):
        pipeline.open_source(root, "short", Tokenizer(other))
    sources, _ = open_both(corpus)
    with pytest.raises(BadInput, match="must be above 0"):
        pipeline.train_batches(
            sources, {"short": 0.0}, tokenizer, batch_size=1, seq_len=8, max_segments=2, seed=0
        )


def test_a_truncated_shard_is_named(corpus, tmp_path):
    root, tokenizer = corpus
    (tmp_path / "short").mkdir()
    for file in (root / "short").iterdir():
        if file.is_file():
            (tmp_path / "short" / file.name).write_bytes(file.read_bytes())
    shard = next((tmp_path / "short").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(BadInput, match=shard.name):
        pipeline.open_source(tmp_path, "short", tokenizer)
