"""From text to a checkpoint in one call: what the text decides, resuming, and what is refused."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollama_jax import checkpoint, own, recipes
from nanollama_jax.config import check
from nanollama_jax.data.shards import load_manifest
from nanollama_jax.errors import BadInput
from nanollama_jax.train.metrics import read_rows

TINY = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 16,
    "model.ffn_dim": 64,
    "seq_len": 32,
    "batch_size": 4,
    "loss.chunk_tokens": 128,
    "validation.tokens": 512,
}


def words(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(300)]
    return "".join(
        rng.choice(vocabulary) + rng.choice((" ", " ", " ", ".\n")) for _ in range(count)
    )


def config_of(tmp_path, text: str, size: str = "nano", **settings):
    config = recipes.own(size)
    config.text = text
    config.update_from_flattened_dict(TINY | {"data.dir": str(tmp_path / "data")} | settings)
    return config


def prepared(tmp_path):
    (manifest,) = tmp_path.glob("data/*/text/manifest.json")
    return load_manifest(manifest.parent)


def test_one_book_to_a_checkpoint_and_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(own, "MIN_STEPS", 6)
    book, workdir = tmp_path / "book.txt", tmp_path / "run"
    book.write_text(words(3000))
    settings = TINY | {"data.dir": str(tmp_path / "data"), "epochs": 0.01}
    outcome = own.train_on_text(str(book), "nano", workdir, settings)
    said = capfd.readouterr().out
    assert outcome.finished and outcome.step == 6 and "at least 6" in said
    assert f"Checkpoint: {workdir}/checkpoints/step_6" in said
    assert f"--checkpoint {workdir}" in said and "not searched for benchmarks" in said

    splits = prepared(tmp_path)["splits"]
    assert splits["train"]["documents"] > splits["validation"]["documents"] > 0
    metadata = checkpoint.read_metadata(workdir, 6)
    assert metadata.model.vocab_size == prepared(tmp_path)["vocab_size"] <= 512
    assert metadata.config["end_step"] == metadata.config["schedule"]["total_steps"] == 6
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl") if "loss" in row] == [
        *range(1, 7)
    ]

    assert own.train_on_text(str(book), "nano", workdir, settings).step == 6
    before = sorted(path for path in workdir.rglob("*") if path.is_file())
    book.write_text(words(3000, seed=1))
    with pytest.raises(
        BadInput, match=r"book\.txt changed since it was prepared in .*: put it back"
    ):
        own.train_on_text(str(book), "nano", workdir, settings)
    assert sorted(path for path in workdir.rglob("*") if path.is_file()) == before
    book.unlink()  # what was prepared from it is still there
    assert own.prepare(config_of(tmp_path, str(book))).tokenizer.vocab_size <= 512


def test_steps_and_schedule_follow_from_tokens_and_epochs(tmp_path):
    (tmp_path / "book.txt").write_text(words(20_000))
    stage = own.prepare(config_of(tmp_path, f"{tmp_path}/*.txt", epochs=2.0))
    check(stage)
    train = prepared(tmp_path)["splits"]["train"]
    tokens = train["tokens"] + 2 * train["documents"]
    assert stage.end_step == round(2 * tokens / 128) > own.MIN_STEPS
    schedule = stage.schedule
    assert schedule.total_steps == stage.end_step
    assert schedule.warmup_steps == round(0.05 * stage.end_step)
    assert schedule.decay_start == stage.end_step - round(0.2 * stage.end_step)
    assert "text" not in stage and stage.tokens_per_step == 128


def test_many_documents_are_prepared_as_they_are(tmp_path):
    lines = [json.dumps({"body": words(50, seed)}) for seed in range(100)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    url = f"file://{tmp_path}/many.jsonl?text=body"
    stage = own.prepare(config_of(tmp_path, url, **{"data.validation_fraction": 0.0005}))
    manifest = prepared(tmp_path)
    assert stage.corpora.text.url == manifest["url"] == url
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == 100
    assert splits["validation"]["documents"] >= 4 and stage.data.validation_fraction > 0.0005
    with (tmp_path / "many.jsonl").open("a") as file:
        file.write("\n" + lines[0])
    with pytest.raises(BadInput, match="changed since it was prepared"):
        own.prepare(config_of(tmp_path, url))


def test_text_that_repeats_itself_gets_a_smaller_vocabulary(tmp_path):
    (tmp_path / "same.txt").write_text("the same words again and again, " * 2000)
    stage = own.prepare(config_of(tmp_path, str(tmp_path / "same.txt")))
    assert 259 < stage.model.vocab_size < own.MIN_PIECES
    assert stage.model.vocab_size == stage.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("content", "text", "says"),
    [
        ("a few words", "book.txt", "too little to train on a part and validate on the rest"),
        ("", "book.txt", "0 documents"),
        ("text", "absent*.txt", "no file matches"),
        ("text", "", "text='': must be the text to train on"),
        ("text", "book.doc", "no file matches"),
    ],
)
def test_text_that_cannot_be_trained_on(tmp_path, content, text, says):
    (tmp_path / "book.txt").write_text(content)
    with pytest.raises(BadInput, match=says):
        own.run(config_of(tmp_path, text and str(tmp_path / text)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_the_text_decides_cannot_be_given():
    assert "end_step" not in recipes.own("nano") and "total_steps" not in recipes.own("1b").schedule
    assert not any(recipes.own("60m").data.benchmarks.values())


def test_names_are_those_of_the_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(text, size="nano"):
        config = recipes.own(size)
        config.text = text
        return own.folder_name(config)

    assert name("texts/**/*.txt", "60m").startswith("texts_") and name("a/my book.txt") != name(
        "b/my book.txt"
    )
    assert name("a/my book.txt").startswith("my_book_")
    assert name("hf://OWNER/NAME?text=content").startswith("NAME_")
    assert name(f"{tmp_path}/x.txt") == name("x.txt") == name(f"file://{tmp_path}/x.txt")


@given(st.text(alphabet="ab \n", max_size=400), st.integers(2, 50))
def test_pieces_are_the_text(text, length):
    pieces = list(own.cut(text, length))
    assert "".join(pieces) == text and all(0 < len(piece) <= length for piece in pieces)
