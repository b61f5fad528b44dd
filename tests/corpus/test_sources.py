import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax.corpus import formats
from nanollama_jax.corpus.sources import read_documents
from nanollama_jax.errors import BadInput
from nanollama_jax.synthetic import builtin

TEXTS = [f"document {i}\nzażółć 漢字 🙂 " + "x" * i for i in range(50)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_all_formats(folder):
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(LINES))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(LINES))
    pa.parquet.write_table(
        pa.table({"id": list(range(50)), "text": TEXTS}), folder / "a.parquet", row_group_size=7
    )
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)


def read_texts(url, rank=0, world_size=1):
    return [document.text for document in read_documents(url, rank, world_size)]


def read_error(url) -> str:
    with pytest.raises(BadInput) as error:
        list(read_documents(url, 0, 1))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "pattern", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "*.txt"]
)
def test_every_format_gives_the_same_documents_whatever_the_number_of_ranks(tmp_path, pattern):
    write_all_formats(tmp_path)
    url = f"file://{tmp_path}/{pattern}"
    assert read_texts(url) == TEXTS
    ids = {document.id: document.text for document in read_documents(url, 0, 1)}
    assert len(ids) == 50
    for world_size in (3, 49, 64):
        ranks = [list(read_documents(url, rank, world_size)) for rank in range(world_size)]
        assert {document.id: document.text for rank in ranks for document in rank} == ids
        assert sum(map(len, ranks)) == 50
        assert max(map(len, ranks)) <= -(-50 // world_size) + 1, "one rank does the work of others"


def test_files_are_dealt_whole_where_there_are_enough(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_text(f'{{"text": "{i}a"}}\n{{"text": "{i}b"}}\n')
    assert read_texts(f"file://{tmp_path}/*.jsonl", 1, 2) == ["1a", "1b", "3a", "3b"]
    assert [document.id for document in read_documents(f"file://{tmp_path}/*.jsonl", 3, 4)] == [
        f"{tmp_path}/3.jsonl:1",
        f"{tmp_path}/3.jsonl:2",
    ]


@pytest.mark.parametrize("world_size", [3, 4, 7, 64])
def test_each_rank_opens_one_file_where_there_are_fewer_than_ranks(
    tmp_path, monkeypatch, world_size
):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(20))
        )
    opened, unpacked = [], formats.unpacked
    monkeypatch.setattr(
        formats, "unpacked", lambda stored, path: opened.append(path) or unpacked(stored, path)
    )
    ranks = [
        read_texts(f"file://{tmp_path}/*.jsonl", rank, world_size) for rank in range(world_size)
    ]
    assert opened == [f"{tmp_path}/{rank % 3}.jsonl" for rank in range(world_size)]
    assert sorted(itertools.chain(*ranks)) == sorted(
        f"{i} {j}" for i in range(3) for j in range(20)
    )


def test_home_two_double_stars_plus_and_byte_order_mark(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.txt").write_bytes(b"\xef\xbb\xbfonce")
    (tmp_path / "c++.jsonl").write_text('{"c++": "plus"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_texts(f"file://{tmp_path}/**/**/x.txt") == ["once"]
    assert read_texts("file://~/c++.jsonl?text=c++") == ["plus"]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("[2024]/a.jsonl", "[2024]/*.jsonl"),
        ("[2024]/a.jsonl", "[2024]/a.jsonl"),
        ("x/[a] [b]/y/1.jsonl", "*/[a] [b]/**/[0-9].jsonl"),
        ("[x/a].jsonl", "[x/*.jsonl"),
        ("part-1.jsonl", "part-[0-9].jsonl"),
    ],
)
def test_brackets_are_a_name_or_else_a_pattern(tmp_path, name, url):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "x"}\n')
    assert read_texts(f"file://{tmp_path}/{url}") == ["x"]


def test_a_name_with_brackets_comes_before_the_pattern(tmp_path):
    for folder in ("[12]", "1", "2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    assert read_texts(f"file://{tmp_path}/[12]/*.txt") == ["[12]"]
    (tmp_path / "[12]/a.txt").unlink()
    assert read_texts(f"file://{tmp_path}/[12]/*.txt") == ["1", "2"]
    assert "rename the folder, or name its files as file://" in read_error(f"hf://{tmp_path}/[12]")


def test_zstd_with_a_long_window_and_several_frames(tmp_path):
    """`zstd --long=28`: a window of 256 MB, of which the decoder takes as much memory as there is content."""
    line = json.dumps({"text": "a long window " * 10}).encode() + b"\n"
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    packed = frame.compress(line * 1000) + frame.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed + zstandard.compress(line) + packed)
    assert len(read_texts(f"file://{path}")) == 2001
    path.write_bytes(packed + packed[:-9])
    assert "is cut off: it ends in the middle of a frame" in read_error(f"file://{path}")
    path.write_bytes(packed + b"something else")
    assert "Unknown frame descriptor" in read_error(f"file://{path}")


def test_a_row_group_of_a_parquet_file_is_not_read_whole(tmp_path):
    """By a process of its own, whose memory is then known: 300 MB of text in one row group."""
    text = "".join(map(str, range(3000)))
    writer_options = dict(row_group_size=30_000, use_dictionary=False, compression="none")
    pa.parquet.write_table(
        pa.table({"text": [text] * 30_000}), tmp_path / "a.parquet", **writer_options
    )
    script = (
        "import resource; from nanollama_jax.corpus.sources import read_records\n"
        f"rows = read_records('file://{tmp_path}/a.parquet', 1, 2, columns=['text'])\n"
        "where, _ = next(rows); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(where.rpartition(':')[2], 1 + sum(1 for _ in rows), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    first, count, megabytes = map(int, result.stdout.split())
    assert (first, count) == (2, 15_000) and megabytes < 100, result.stdout


@pytest.mark.parametrize(
    "url", ["hf://", "hf:///", "hf://?name=x", "file://", "tfds://", "builtin://"]
)
def test_a_scheme_alone_names_nothing(url):
    assert "names nothing" in read_error(url)


def test_a_field_of_the_hub_that_changes_its_type_late(tmp_path):
    """Each kind fails in another place of datasets: one file read by pyarrow at once is no error, files are."""
    for name, others in (
        ("number", ['{"text": "b", "n": "s"}']),
        ("object", ['{"text": "b", "n": {"a": 1}}']),
        ("damaged", ["{broken"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train-0.jsonl").write_text('{"text": "a", "n": 1}\n' * 3)
        (folder / "train-1.jsonl").write_text("\n".join(others))
        error = read_error(f"hf://{folder}")
        assert f"hf://{folder} cannot be read after hf://{folder}/train/0:3 (" in error, error
        assert f"file://{folder}/**/*.jsonl reads rows whatever their types" in error
        if name == "damaged":
            assert "train-1.jsonl:1: malformed JSON" in read_error(f"file://{folder}/**/*.jsonl")
        else:
            assert read_texts(f"file://{folder}/**/*.jsonl") == ["a", "a", "a", "b"]


def test_half_a_surrogate_pair_is_refused_from_any_scheme(monkeypatch):
    monkeypatch.setattr(builtin, "read", lambda *_: iter([("docs/x", "a\ud800")]))
    assert "builtin://docs/x: half a surrogate pair" in read_error("builtin://docs")


def test_builtin_documents_of_a_module_go_to_the_same_side(monkeypatch):
    monkeypatch.setattr(builtin, "read", lambda name, *_: iter([(f"{name}/x.y", "text")]))
    for name, split_key in (("docs", "x.y"), ("code", "x.y"), ("reasoning", "")):
        (document,) = read_documents(f"builtin://{name}", 0, 1)
        assert document.split_key == split_key


def test_relative_paths_question_marks_and_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part-1.jsonl").write_text('{"body": "one"}\n')
    (tmp_path / "part-2.jsonl").write_text('{"body": "two"}\n')
    assert read_texts("file://part-?.jsonl?text=body") == ["one", "two"]
    assert read_texts("file://./part-1.jsonl?text=body") == ["one"]
    assert "no field 'text': choose one of body" in read_error("file://part-1.jsonl")
    assert "unknown option 'txt'" in read_error("file://part-1.jsonl?txt=body")


def test_documents_without_visible_text_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": " \\n\\t"}\n{"text": "x"}\n')
    assert [(d.id, d.text) for d in read_documents(f"file://{tmp_path}/a.jsonl", 0, 1)] == [
        (f"{tmp_path}/a.jsonl:4", "x")
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "\xff\xfe"}', "a.jsonl:2: invalid UTF-8"),
        (b'{"text": "a\\u0000b"}', "a.jsonl:2: .*NUL"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: half a surrogate pair"),
        (b'{"text": "cut o', "a.jsonl:2: malformed JSON: .* at column 10"),
        (b'{"n": ' + b"1" * 5000 + b"}", "a.jsonl:2: the line cannot be read: .*4300"),
        (b'{"n": ' + b"[" * 100_000, "a.jsonl:2: the line cannot be read: .*recursion"),
        (b'["text"]', "a.jsonl:2: a line must hold a JSON object, not a list"),
        (b'{"title": "t", "body": "b"}', "a.jsonl:2: no field 'text': choose one of title, body"),
        (b'{"text": null}', "a.jsonl:2: .*NoneType"),
        (b'{"text": ["a"]}', "a.jsonl:2: .*list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(BadInput, match=complaint):
        read_texts(f"file://{tmp_path}/a.jsonl")


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        min_size=1,
    ),
    ascii_only=st.booleans(),
)
def test_any_text_comes_back_from_jsonl(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts),
        encoding="utf-8",
        newline="",
    )
    assert read_texts(f"file://{path}") == [text for text in texts if text.strip()]


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_truncated_compressed_file_is_named(tmp_path, suffix, kept):
    write_all_formats(tmp_path)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert f"a.jsonl.{suffix} cannot be read to its end" in read_error(f"file://{path}")


def test_damage_is_found_in_every_other_format(tmp_path):
    write_all_formats(tmp_path)
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-100])
    assert "a.parquet is damaged" in read_error(f"file://{parquet}")
    (tmp_path / "bad.txt").write_bytes(b"fine\nfine\nbad \xff\n")
    assert "bad.txt:3: invalid UTF-8" in read_error(f"file://{tmp_path}/bad.txt")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    assert "nul.txt: the text holds a NUL" in read_error(f"file://{tmp_path}/nul.txt")
    (tmp_path / "garbage.jsonl.xz").write_bytes(b"not xz at all")
    assert "garbage.jsonl.xz cannot be read" in read_error(f"file://{tmp_path}/garbage.jsonl.xz")


def test_a_url_that_reads_nothing_says_why(tmp_path):
    assert "no file matches" in read_error(f"file://{tmp_path}/absent.jsonl")
    assert "it is a directory" in read_error(f"file://{tmp_path}")
    assert "begin it with one of builtin://, file://, hf://, tfds://" in read_error(
        "s3://bucket/key.jsonl"
    )
    assert "begin it with one of" in read_error(f"{tmp_path}/a.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    assert "unknown file extension: there are .txt, .jsonl" in read_error(
        f"file://{tmp_path}/a.csv"
    )
    pa.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert "no field 'text': choose one of body" in read_error(f"file://{tmp_path}/b.parquet")


def test_a_local_folder_in_the_hubs_layout(tmp_path, monkeypatch):
    import datasets

    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for shard in range(3):
        table = pa.table({"content": TEXTS[shard::3], "license": ["mit"] * len(TEXTS[shard::3])})
        pa.parquet.write_table(table, folder / f"train-{shard:05d}-of-00003.parquet")
    url = f"hf://{tmp_path}/hub?split=train&text=content"
    assert sorted(read_texts(url)) == sorted(TEXTS)
    for world_size in (2, 5):
        ranks = [list(read_documents(url, rank, world_size)) for rank in range(world_size)]
        assert {d.id: d.text for rank in ranks for d in rank} == {
            d.id: d.text for d in read_documents(url, 0, 1)
        }
        assert sum(map(len, ranks)) == 50 and min(map(len, ranks)) > 0
    opened = []
    shard = datasets.IterableDataset.shard
    monkeypatch.setattr(
        datasets.IterableDataset,
        "shard",
        lambda self, *, num_shards, index: opened.append(index) or shard(self, num_shards, index),
    )
    for rank in range(5):
        read_texts(url, rank, 5)
    assert opened == [0, 1, 2, 0, 1], "a rank opened more than one file"
    assert "no field 'text': choose one of content, license" in read_error(f"hf://{tmp_path}/hub")
    assert "cannot be read" in read_error(f"hf://{tmp_path}/hub?split=test&text=content")
    assert "is no folder" in read_error(f"hf://{tmp_path}/absent")


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path):
    script = "from nanollama_jax.corpus.sources import read_documents\nfrom nanollama_jax.errors import one_line_errors\n"
    script += "with one_line_errors(): next(read_documents('hf://OWNER/NAME', 0, 1))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": "."}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "hf://OWNER/NAME cannot be read" in result.stderr and "set HF_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_tfds_set_is_read_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"book_text": tfds.features.Text(), "year": tfds.features.Text()}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(TEXTS):
                yield i, {"book_text": text, "year": b"\xff is no UTF-8, and is not asked for"}

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    url = f"tfds://tiny?data_dir={tmp_path}&text=book_text"
    assert sorted(read_texts(url)) == sorted(TEXTS)
    assert sorted(itertools.chain(*(read_texts(url, rank, 4) for rank in range(4)))) == sorted(
        TEXTS
    )
    assert "no field 'text': choose one of book_text, year" in read_error(
        f"tfds://tiny?data_dir={tmp_path}"
    )
    assert "cannot be read" in read_error(f"tfds://tiny?data_dir={tmp_path}&split=test")
    assert "prepare it once with" in read_error(f"tfds://pg19?data_dir={tmp_path}")
    assert "tensorflow" not in sys.modules
