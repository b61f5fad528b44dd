import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict
from sentencepiece import sentencepiece_model_pb2

from nanollama_jax import tokenizer
from nanollama_jax.corpus import executor, prepare, preparer, sources
from nanollama_jax.corpus.executor import Executor
from nanollama_jax.data import shards
from nanollama_jax.errors import BadInput

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "document",
    "and",
    "learns",
    "to",
    "predict",
    "what",
    "follows.\n\n",
    "   return",
    "value",
    "==",
    "None\n",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = random.Random(0)
    lengths = [generator.randint(5, 400) for _ in range(400)] + [
        30_000
    ]  # the last is longer than a shard
    return [" ".join(generator.choice(WORDS) for _ in range(length)) for length in lengths]


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    tokenizer.train(texts, path, vocab_size=300, max_bytes=10**9)
    return path


def run(corpus, model, out_dir, **changes):
    arguments = (
        dict(validation_fraction=0.1, tasks=3, executor=Executor(workers=2), shard_tokens=20_000)
        | changes
    )
    return prepare.prepare_source("corpus", f"file://{corpus}", "CC0", out_dir, model, **arguments)


@pytest.fixture(scope="module")
def prepared(corpus, model, tmp_path_factory) -> pathlib.Path:
    out_dir = tmp_path_factory.mktemp("prepared") / "corpus"
    run(corpus, model, out_dir)
    return out_dir


def contents(directory) -> dict[str, str]:
    """sha256 of all that a reader uses: not the logs."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(directory).iterdir()
        if path.is_file()
    }


def read_ids(path, manifest) -> list[list[int]]:
    return [
        np.frombuffer(record, manifest["dtype"]).tolist()
        for record in ArrayRecordReader(str(path)).read_all()
    ]


def test_the_shards_hold_exactly_sentencepieces_ids(prepared, texts, model):
    manifest = shards.load_manifest(prepared)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = {text: processor.encode(text) for text in texts}
    found = {split: [] for split in shards.SPLITS}
    for split in shards.SPLITS:
        for path, shard in zip(
            shards.split_shards(prepared, manifest, split),
            manifest["splits"][split]["shards"],
            strict=True,
        ):
            documents = read_ids(path, manifest)
            assert (shard["documents"], shard["tokens"]) == (
                len(documents),
                sum(map(len, documents)),
            )
            assert shard["bytes"] == sum(len(processor.decode(ids).encode()) for ids in documents)
            assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert ArrayRecordReader(str(path)).writer_options_string().startswith("group_size:1,")
            found[split] += documents
        totals = manifest["splits"][split]
        assert totals["documents"] == len(found[split]) and totals["tokens"] == sum(
            map(len, found[split])
        )
    assert sorted(found["train"] + found["validation"]) == sorted(expected.values())
    assert 0.05 < len(found["validation"]) / len(texts) < 0.15
    assert manifest["dtype"] == "uint16" and manifest["vocab_size"] == 300
    assert manifest["tokenizer_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()


def test_shards_roll_over_and_a_longer_document_has_one_to_itself(prepared):
    splits = shards.load_manifest(prepared)["splits"]
    assert len(splits["train"]["shards"]) > 3
    written = splits["train"]["shards"] + splits["validation"]["shards"]
    assert [shard["documents"] for shard in written if shard["tokens"] > 20_000] == [1]
    assert {shard["file"] for shard in written} == {path.name for path in prepared.iterdir()} - {
        "manifest.json",
        "logs",
    }


def test_the_number_of_workers_does_not_matter(corpus, model, prepared, tmp_path):
    run(corpus, model, tmp_path / "one", executor=Executor(workers=1))
    assert contents(tmp_path / "one") == contents(prepared)


def test_the_same_text_is_always_on_the_same_side(corpus, model, tmp_path):
    (tmp_path / "twice.jsonl").write_text(corpus.read_text() * 2)
    manifest = run(tmp_path / "twice.jsonl", model, tmp_path / "out", tasks=2)
    sides = {split: [] for split in shards.SPLITS}
    for split in shards.SPLITS:
        for path in shards.split_shards(tmp_path / "out", manifest, split):
            sides[split] += map(tuple, read_ids(path, manifest))
    assert not set(sides["train"]) & set(sides["validation"])
    assert all(side.count(ids) == 2 for side in sides.values() for ids in set(side))


def test_a_split_key_decides_instead_of_the_text(model, tmp_path, monkeypatch):
    documents = [sources.Document(f"text {i}", str(i), split_key=str(i // 20)) for i in range(200)]
    monkeypatch.setattr(prepare, "read_documents", lambda *_: iter(documents))
    (tmp_path / "texts.jsonl").write_text("")
    manifest = run(
        tmp_path / "texts.jsonl", model, tmp_path / "out", validation_fraction=0.5, tasks=1
    )
    counts = [manifest["splits"][split]["documents"] for split in shards.SPLITS]
    assert sum(counts) == 200 and min(counts) > 0 and counts[0] % 20 == 0


def test_a_finished_directory_is_left_as_it_is(corpus, model, prepared, monkeypatch):
    def refuse(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(preparer, "run_ranks", refuse)
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert run(corpus, model, prepared, executor=Executor(workers=1)) == shards.load_manifest(
        prepared
    )
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


@pytest.mark.parametrize(
    "changes", [dict(validation_fraction=0.2), dict(tasks=4), dict(shard_tokens=30_000)]
)
def test_an_unfinished_directory_of_other_settings_is_refused(
    corpus, model, prepared, tmp_path, changes
):
    (tmp_path / "logs/ranks").mkdir(parents=True)
    (tmp_path / "logs/inputs.json").write_bytes((prepared / "logs/inputs.json").read_bytes())
    (tmp_path / "logs/ranks/00001.json").touch()
    with pytest.raises(
        BadInput,
        match=rf"prepared with {next(iter(changes))}=.*: set it back to use what is there, or remove .*, or choose another data\.dir",
    ):
        run(corpus, model, tmp_path, **changes)


def test_a_finished_directory_of_something_else_is_refused(
    corpus, model, prepared, texts, tmp_path
):
    tokenizer.train(texts, tmp_path / "other.model", vocab_size=310, max_bytes=10**9)
    with pytest.raises(BadInput, match="prepared with tokenizer_sha256="):
        run(corpus, tmp_path / "other.model", prepared)
    with pytest.raises(BadInput, match="prepared with url="):
        run(f"{corpus}?text=text", model, prepared)
    with pytest.raises(BadInput, match=r"prepared with validation_fraction=0\.1, not 0\.3"):
        run(corpus, model, prepared, validation_fraction=0.3)


def test_a_damaged_shard_is_named(corpus, model, tmp_path):
    manifest = run(corpus, model, tmp_path)
    shard = shards.split_shards(tmp_path, manifest, "train")[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(BadInput, match=f"{shard.name} is damaged"):
        run(corpus, model, tmp_path)
    shard.write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=f"{shard.name} has .* bytes instead of"):
        run(corpus, model, tmp_path)
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard.name} is missing"):
        shards.verify_shards(tmp_path, manifest)


def test_another_list_of_files_is_refused_finished_or_not(corpus, model, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(corpus.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(executor, "_run_on_cores", interrupt)
        with pytest.raises(BadInput, match="^stopped; rerun the command to resume$"):
            run(tmp_path / "*.jsonl", model, tmp_path / "out")
    (tmp_path / "out/logs/ranks/00001.json").touch()
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    with pytest.raises(
        BadInput,
        match=r"another list of files than .* now matches \(2 then, 2 now\): put back .*; to prepare the new list, remove",
    ):
        run(tmp_path / "*.jsonl", model, tmp_path / "out")
    (tmp_path / "c.jsonl").rename(tmp_path / "b.jsonl")
    (tmp_path / "out/logs/ranks/00001.json").unlink()
    run(tmp_path / "*.jsonl", model, tmp_path / "out")
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(
        BadInput,
        match=r"\(2 then, 1 now\): put back .*; to prepare the new list, choose another data\.dir",
    ):
        run(tmp_path / "*.jsonl", model, tmp_path / "out")


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_empty_split_is_refused(model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(
        BadInput,
        match=r"has 2 documents and none fell into validation at .*=1e-09: raise data.validation_fraction$",
    ):
        run(tmp_path / "a.jsonl", model, tmp_path / "out", validation_fraction=1e-9, tasks=1)
    with pytest.raises(
        BadInput, match=r"none fell into train at .*: lower data.validation_fraction$"
    ):
        run(tmp_path / "a.jsonl", model, tmp_path / "other", validation_fraction=1 - 1e-9, tasks=1)
    # Nothing of a preparation that cannot be used keeps the setting from being changed.
    manifest = run(
        tmp_path / "a.jsonl", model, tmp_path / "other", validation_fraction=0.0, tasks=1
    )
    assert manifest["splits"]["train"]["documents"] == 2


def test_shards_that_the_manifest_does_not_name_are_removed(corpus, model, prepared, tmp_path):
    for name in ("train-00000-099.array_record", "train-00000-098.array_record.tmp"):
        (tmp_path / name).write_text("left by a killed rank")
    run(corpus, model, tmp_path)
    assert contents(tmp_path) == contents(prepared)


class TakesTwo(Exception):
    """Pickles, and cannot be built again."""

    def __init__(self, one, two):
        super().__init__(one)


def test_an_exception_that_cannot_be_pickled_is_not_a_killed_worker(tmp_path):
    def work(*_):
        raise TakesTwo("what went wrong", 2)

    (tmp_path / "ranks").mkdir()
    with pytest.raises(RuntimeError, match=r"TakesTwo\('what went wrong'\)"):
        executor._run_in_worker(work, 0, 1, tmp_path)


def test_a_source_that_was_changed_is_refused_once_a_rank_has_read_it(corpus, model, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True)
    source = tmp_path / "texts.jsonl"
    source.write_text("".join([*lines[:40], "no JSON\n", *lines[40:80]]))
    with pytest.raises(BadInput, match=r"texts\.jsonl:41: malformed JSON"):
        run(
            source, model, tmp_path / "out", tasks=4, executor=Executor(workers=1)
        )  # its line is the first rank's
    source.write_text("".join(lines[:80]))
    manifest = run(source, model, tmp_path / "out", tasks=4)  # nothing was done yet
    assert sum(manifest["splits"][split]["documents"] for split in shards.SPLITS) == 80
    source.write_text("".join(lines[:81]))
    with pytest.raises(
        BadInput,
        match=r"files of file://.*texts\.jsonl were changed since .*out was prepared: put them back, .*, choose another data\.dir",
    ):
        run(source, model, tmp_path / "out", tasks=4)


def test_a_users_own_files_in_the_folder_stay(corpus, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.array_record").write_text("mine")
    run(corpus, model, tmp_path / "out")
    assert (tmp_path / "out/mine.array_record").read_text() == "mine"


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert executor.cores() == os.cpu_count()


def test_an_empty_source_is_refused(model, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(BadInput, match="has no documents"):
        run(tmp_path / "empty.jsonl", model, tmp_path / "out")
    with pytest.raises(BadInput, match="is not prepared: run python tools/prepare_data.py"):
        shards.load_manifest(tmp_path / "out")


def test_a_vocabulary_over_16_bits_is_stored_in_32():
    assert shards.dtype_for(65_536) == "uint16" and shards.dtype_for(65_537) == "uint32"


def test_a_tokenizers_sample_takes_equal_shares_and_no_more(tmp_path):
    for name, unit in (("a", "a "), ("b", "b ")):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": unit * 500}) + "\n" for _ in range(1000))
        )
    with open(tmp_path / "b.jsonl", "ab") as file:
        file.write(b"malformed, but past what is read")
    samples = {
        name: list(prepare._sample(f"file://{tmp_path}/{name}.jsonl", 50_500)) for name in "ab"
    }
    for name, sample in samples.items():
        assert sum(map(len, sample)) == 50_500 and set("".join(sample)) == {name, " "}
    (tmp_path / "short.txt").write_text("żółw" * 10)
    assert list(prepare._sample(f"file://{tmp_path}/short.txt", 10**6)) == ["żółw" * 10]
    assert list(prepare._sample(f"file://{tmp_path}/short.txt", 8)) == ["żółw"]
    assert list(prepare._sample(f"file://{tmp_path}/short.txt", 7)) == ["żółw"]


@pytest.fixture
def config(corpus, tmp_path) -> ConfigDict:
    return ConfigDict(
        {
            "tokenizer": {
                "path": str(tmp_path / "t.model"),
                "vocab_size": 300,
                "training_bytes": 100_000,
                "sources": ("one", "two"),
            },
            "corpora": {
                name: {"url": f"file://{corpus}", "licence": "CC0"} for name in ("one", "two")
            },
            "data": {
                "dir": str(tmp_path / "data"),
                "validation_fraction": 0.1,
                "prepare_tasks": 2,
                "benchmarks": {},
            },
        }
    )


def test_prepare_all_trains_prepares_and_is_done(config, capsys):
    prepare.prepare_all(config)
    first = capsys.readouterr().out
    assert "training" in first and "bytes per token" in first
    for name in ("one", "two"):
        manifest = shards.load_manifest(f"{config.data.dir}/{name}")
        assert manifest["name"] == name and manifest["licence"] == "CC0"
    prepare.prepare_all(config)
    assert capsys.readouterr().out == f"{config.data.dir}: already prepared: one, two\n"


def test_prepare_all_refuses_a_tokenizer_that_does_not_fit(config, model):
    config.tokenizer.sources = ("three",)
    with pytest.raises(BadInput, match="is missing, and three, .* is not in this config's corpora"):
        prepare.prepare_all(config)
    config.tokenizer.path = str(model)
    config.tokenizer.vocab_size = 4096
    with pytest.raises(BadInput, match="has 300 pieces and tokenizer.vocab_size is 4,096"):
        prepare.prepare_all(config)


def test_a_tokenizer_that_no_export_can_express_is_named_before_the_work(
    config, model, capsys, tmp_path
):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    config.tokenizer.path, config.corpora = str(tmp_path / "odd.model"), {}
    for odd, warnings in ((True, 2), (False, 0)):
        proto.normalizer_spec.remove_extra_whitespaces = odd
        (tmp_path / "odd.model").write_bytes(proto.SerializeToString())
        prepare.prepare_all(config)
        out = capsys.readouterr().out
        assert (
            out.count("warning: ")
            == out.count("the tokenizer removes extra whitespace\n")
            == warnings
        )


def test_nothing_heavy_is_imported():
    script = "import sys; from nanollama_jax.corpus import prepare; print({'jax', 'flax', 'tensorflow', 'torch', 'datasets'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "set()\n"
