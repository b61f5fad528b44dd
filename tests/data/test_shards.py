"""Damage to a prepared corpus is found before it is trained on, and named; what is whole is used, whatever became of its text."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from nanollama_jax.corpus import finetuning, prepare
from nanollama_jax.corpus.executor import Executor
from nanollama_jax.data import pipeline, rows, shards
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer, train

TEXTS = [f"{i} is a number, and {i * i} is its square, which is not {i}" for i in range(400)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A corpus of two shards of equal size in `corpus`, made of `text/*.jsonl` with `t.model`."""
    root = tmp_path_factory.mktemp("made")
    (root / "text").mkdir()
    for half, texts in enumerate((TEXTS[:200], TEXTS[200:])):
        (root / f"text/{half}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    train(TEXTS, root / "t.model", vocab_size=300, max_bytes=10**9)
    again(root)
    return root


@pytest.fixture
def root(made, tmp_path) -> pathlib.Path:
    """A copy whose shards were verified, of text that is gone."""
    for name in ("corpus", "t.model"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, tmp_path / name)
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    shards.verify_shards(tmp_path / "corpus", manifest)
    return tmp_path


def again(root, text=None, **changes) -> dict:
    settings = dict(validation_fraction=0.1, tasks=2, executor=Executor(workers=1)) | changes
    return prepare.prepare_source(
        "corpus",
        f"file://{text or root}/text/*.jsonl",
        "CC0",
        root / "corpus",
        root / "t.model",
        **settings,
    )


def opened(root) -> pipeline.Source:
    return pipeline.open_source(root, "corpus", Tokenizer(root / "t.model"))


def train_shards(root) -> list[pathlib.Path]:
    return sorted((root / "corpus").glob("train-*"))


def test_whole_shards_are_read_once(root, monkeypatch):
    opened(root)
    read, checksum = [], shards._checksum
    monkeypatch.setattr(shards, "_checksum", lambda path: read.append(path.name) or checksum(path))
    opened(root)
    assert not read
    os.utime(train_shards(root)[1], ns=(1, 1))
    opened(root)
    opened(root)
    assert read == ["train-00001-000.array_record"]
    (root / "corpus" / shards.VERIFIED).write_bytes(b"\0\xff")
    opened(root)
    assert len(read) == 5


def test_preparation_has_verified_what_it_wrote(made, monkeypatch):
    monkeypatch.setattr(shards, "_checksum", lambda path: pytest.fail(f"{path} was read again"))
    again(made)


def test_swapped_shards_of_equal_size_are_not_trained_on(root, made):
    first, second = train_shards(root)
    assert first.stat().st_size == second.stat().st_size
    for old, new in ((first, root / "x"), (second, first), (root / "x", second)):
        old.rename(new)
    with pytest.raises(
        BadInput,
        match=rf"shard {first} is damaged or was replaced: its checksum differs: restore it from a copy",
    ):
        opened(root)
    with pytest.raises(BadInput, match=rf"shard {first} is damaged or was replaced"):
        again(root, made)


@pytest.mark.parametrize("at", [10, 100, 2000, -1])
@pytest.mark.parametrize("keep_times", [False, True])
def test_one_flipped_bit_is_found_before_training(root, at, keep_times):
    shard = train_shards(root)[1]
    flip(shard, at, keep_times)
    with pytest.raises(BadInput, match=rf"shard {shard} is damaged"):
        opened(root)


def flip(path, at: int, keep_times: bool = False) -> None:
    before, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def read_an_epoch(source, tokenizer) -> None:
    batches = iter(
        pipeline.train_batches(
            {"corpus": source},
            {"corpus": 1.0},
            tokenizer,
            batch_size=8,
            seq_len=512,
            max_segments=64,
            seed=0,
            windows={"corpus": 100},
        )
    )
    for _ in range(10):
        next(batches)


def test_damage_that_comes_later_is_one_line_that_names_the_shard(root, monkeypatch):
    """As bits that rot under an unchanged inode."""
    shard = train_shards(root)[1]
    flip(shard, 2000)
    monkeypatch.setattr(pipeline, "verify_shards", lambda *_: None)
    with pytest.raises(
        BadInput, match=rf"shard {shard} cannot be read \(.*hash mismatch.*checkpoints are intact"
    ) as error:
        read_an_epoch(opened(root), Tokenizer(root / "t.model"))
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match=rf"shard {shard} cannot be read"):
        rows._read_all(shard)


def test_a_folder_that_cannot_be_written_is_verified_at_each_start(root, monkeypatch, capsys):
    (root / "corpus" / shards.VERIFIED).unlink()
    monkeypatch.setattr(
        shards, "write_json", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    opened(root)
    assert (
        "verified.json cannot be written (Read-only file system): the next start compares"
        in capsys.readouterr().out
    )


def change(manifest, path, value):
    *parents, last = path
    inside = manifest
    for key in parents:
        inside = inside[key]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return json.dumps(manifest).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: b"[]",
        lambda m: b"{}",
        lambda m: b"null",
        lambda m: b"3",
        lambda m: b"",
        lambda m: bytes(range(256)),
        lambda m: b"[" * 100_000,
        lambda m: json.dumps(m).encode()[:-10],
        lambda m: change(m, ["splits"], None),
        lambda m: change(m, ["splits"], []),
        lambda m: change(m, ["splits", "validation"], None),
        lambda m: change(m, ["splits", "train", "shards"], {}),
        lambda m: change(m, ["splits", "train", "shards"], []),
        lambda m: change(m, ["splits", "train", "shards", 0], "train-00000-000.array_record"),
        lambda m: change(m, ["splits", "train", "shards", 0, "size"], "x"),
        lambda m: change(m, ["splits", "train", "shards", 0, "sha256"], None),
        lambda m: change(
            m, ["splits", "train", "shards", 0, "file"], "../corpus/train-00000-000.array_record"
        ),
        lambda m: change(m, ["splits", "train", "tokens"], -1),
        lambda m: change(m, ["splits", "train", "documents"], 1.5),
        lambda m: change(m, ["dtype"], "float32"),
        lambda m: change(m, ["dtype"], "uint32"),
        lambda m: change(m, ["dtype"], None),
        lambda m: change(m, ["vocab_size"], "many"),
        lambda m: change(m, ["tokenizer_sha256"], 3),
    ],
)
def test_a_damaged_manifest_is_one_line(root, made, damage):
    path = root / "corpus/manifest.json"
    path.write_bytes(damage(json.loads(path.read_text())))
    with pytest.raises(
        BadInput,
        match=rf"{path} is damaged \(.*: restore it from a copy, or remove .*corpus and prepare it again",
    ) as error:
        opened(root)
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="is damaged"):
        again(root, made)


def test_a_dtype_that_only_the_tokenizer_contradicts(root):
    path = root / "corpus/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"dtype": "uint32", "vocab_size": 100_000}))
    with pytest.raises(
        BadInput, match=r"has dtype=uint32 but documents are stored as uint16: restore the file"
    ):
        opened(root)


def test_a_corpus_whose_text_is_gone_is_used_and_one_that_moved_is_told(root, made, capsys):
    url = f"file://{made}/text/*.jsonl"
    with pytest.raises(
        BadInput,
        match=rf"prepared with url='file://{made}/text/.*: set it back to use what is there, or choose another data.dir",
    ):
        again(root)
    shutil.move(made / "text", made / "moved")
    try:
        assert again(root, made) == shards.load_manifest(made / "corpus")
        assert f"corpus: the files of {url} are gone" in capsys.readouterr().out
        with pytest.raises(BadInput, match=r"prepared with validation_fraction=0\.1, not 0\.2"):
            again(root, made, validation_fraction=0.2)
        flip(train_shards(root)[0], 100)
        with pytest.raises(BadInput, match="is damaged"):
            again(root, made)
        (root / "corpus/manifest.json").unlink()
        with pytest.raises(BadInput, match="no file matches"):
            again(root, made)
    finally:
        shutil.move(made / "moved", made / "text")
    (made / "text/2.jsonl").write_text('{"text": "more"}\n')
    try:
        with pytest.raises(BadInput, match=r"\(2 then, 3 now\): put back the files of before"):
            again(made)
    finally:
        (made / "text/2.jsonl").unlink()


def test_conversations_whose_text_is_gone_are_used_and_damage_is_found(root, capsys):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (root / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": turns, "i": i}) + "\n" for i in range(4))
    )
    (root / "chat.model").write_bytes(Tokenizer(root / "t.model").extended())
    settings = dict(
        licence="none",
        kind="conversations",
        bad_rows="stop",
        max_tokens=64,
        validation_fraction=0.0,
    )

    def run():
        return finetuning.prepare(
            "chats",
            f"file://{root}/chats.jsonl",
            **settings,
            out_dir=root / "chats",
            tokenizer=Tokenizer(root / "chat.model"),
        )

    manifest = run()
    (root / "chats.jsonl").unlink()
    assert run() == manifest and "are gone: using" in capsys.readouterr().out
    (shard,) = shards.split_shards(root / "chats", manifest, "train")
    flip(shard, 100)
    for use in (
        run,
        lambda: pipeline.open_source(
            root, "chats", Tokenizer(root / "chat.model"), "conversations"
        ),
    ):
        with pytest.raises(BadInput, match=rf"shard {shard} is damaged"):
            use()
    assert np.array_equal(manifest["splits"]["train"]["documents"], 4)
