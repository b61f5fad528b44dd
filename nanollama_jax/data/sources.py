"""Where raw data comes from: any source URL, read as records or as datatrove documents, divided among ranks.

    builtin://docs                       also builtin://code and builtin://reasoning: see data/builtin.py
    builtin://math?rows=100              made to order: conversations, also builtin://tools; pairs, builtin://right_or_wrong;
                                         text, builtin://transcripts; of math and right_or_wrong &tasks=gcd,chain_sum has some tasks alone;
                                         &split=test has what is held out
    file://texts/**/*.jsonl.zst          a path or glob, relative or absolute (a name with brackets is
                                         matched as it is first): .txt (a file is one record), .jsonl and
                                         .jsonl.gz, .xz, .zst (a line is one record), .parquet (a row is one record)
    hf://OWNER/NAME?name=SUBSET          streamed from the Hugging Face hub; hf:///PATH is a local folder laid out as on the hub;
                                         &file=NAME reads a single file of JSON lines, whatever its name
    tfds://NAME?data_dir=PATH            a TensorFlow Datasets set prepared as array_record; TensorFlow itself is not needed

Options follow a question mark: `text=FIELD` names the field with the text ("text"); `split`, `name` and `data_dir` mean what they
mean to the library that reads; `tree=oasst` makes conversations of OpenAssistant's messages (data/oasst.py), with `lang=en` of those trees
alone that begin in English. Whatever is wrong with the data raises `BadInput` that names the file and line; only documents
without any visible text are passed over. Ranks read different files where there are enough; where there are fewer files than ranks,
each rank opens a single file, and the ranks that share it take its documents in turn (preparation lets few share a file that is slow to
unpack: split a large .xz).
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import math
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datatrove.data import Document

from nanollama_jax.data import builtin, oasst, reasoning, tool_conversations
from nanollama_jax.errors import BadInput

_RANKS_A_FILE = {".xz": 2, ".gz": 8}
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 2**20, 1024
_PARQUET_ROWS = 64  # in memory at a time: books have a megabyte each
# A question mark is also a glob's wildcard: options begin at one that is followed by "word=".
_URL = re.compile(r"(?P<scheme>\w+)://(?P<path>.*?)(?:\?(?P<options>\w+=.*))?", re.DOTALL)


def read_documents(url: str, rank: int, world_size: int) -> Iterator[Document]:
    """Yields this rank's documents of `url`, always the same in the same order; ids are the same for any `world_size`.

    Raises `BadInput` for a URL that cannot be read and for text that is not clean UTF-8, when it comes to it.
    """
    scheme, _, options = _parse(url)
    field = options.get("text", "text")
    for where, record in read_records(url, rank, world_size, columns=[field]):
        text = text_of(record, field, where)
        if "\0" in text:
            raise BadInput(f"{where}: the text holds a NUL byte: is it really text?")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot: "\ud800"
                raise BadInput(f"{where}: half a surrogate pair in the text: it cannot be written as UTF-8") from error
        if text and not text.isspace():
            split_key = builtin.split_key(where.removeprefix("builtin://")) if scheme == "builtin" else None
            yield Document(text=text, id=where, metadata={"split_key": split_key} if split_key else {})


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """As many at a time as are worth a call of what deals with them: about a million characters."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def read_records(
    url: str, rank: int = 0, world_size: int = 1, *, columns: list[str] | None = None, strict: bool = True
) -> Iterator[tuple[str, dict | BadInput]]:
    """Yields this rank's records of `url` as (where, record): `where` names file and line, `columns` are all that Parquet is read for.

    Raises `BadInput` for what cannot be read; with `strict` off, a line that is no JSON object comes in its turn as the `BadInput` it is.
    """
    scheme, path, options = _parse(url)
    options.pop("text", None)
    tree, lang = options.pop("tree", None), options.pop("lang", None)
    if tree and world_size > 1:
        raise BadInput(f"source {url!r}: {world_size} ranks would tear its trees apart: read it with one")
    records = _SCHEMES[scheme][0](path, rank, world_size, columns=None if tree else columns, **options)
    for where, record in oasst.conversations(records, lang) if tree else records:
        if strict and isinstance(record, BadInput):
            raise record
        yield where, record


def matched_files(url: str) -> list[str] | None:
    """The files that a file:// URL stands for, sorted; None for other schemes."""
    scheme, path, _ = _parse(url)
    return _match(path) if scheme == "file" else None


def is_gone(url: str) -> bool:
    """Whether a file:// URL stands for no file any more."""
    scheme, path, _ = _parse(url)
    return scheme == "file" and not _matches(path)


def about_source(url: str) -> dict[str, Any]:
    """What of a source must be the same where its preparation is gone on with, or not done again: a file:// URL's files, the first rows of what is
    made to order, which another version may make otherwise. Empty for others.

    Documents are dealt by the files' order and by their lines: with others, what finished ranks hold would be read twice, or never.
    """
    scheme, path, _ = _parse(url)
    if scheme == "builtin" and path in _GENERATED:
        return {"rows_sha256": hashlib.sha256(json.dumps(list(itertools.islice(read_records(url), 100))).encode()).hexdigest()}
    if (files := matched_files(url)) is None:
        return {}
    names = "\0".join(files).encode(errors="surrogateescape")
    listed = {"count": len(files), "sha256": hashlib.sha256(names).hexdigest()}
    return {"files": listed, "file_sizes": [os.path.getsize(file) for file in files]}


def useful_ranks(url: str) -> float:
    """How many ranks a source can keep busy: each that shares a file unpacks all of it, and unpacks .xz at 60 MB/s, .gz at 120 (measured)."""
    return len(files) * min(_RANKS_A_FILE.get(Path(path).suffix, 64) for path in files) if (files := matched_files(url)) else math.inf


def stored_files(url: str) -> tuple[list[str], str] | None:
    """The files of a file:// or hf:// source, as fsspec names them, and the field of its text; None for other schemes."""
    scheme, path, options = _parse(url)
    if scheme == "hf" and "file" not in options:
        import datasets

        builder = datasets.load_dataset_builder(path, name=options.get("name"), data_dir=options.get("data_dir"))
        files = (builder.config.data_files or {}).get(options.get("split", "train"))  # a split can be "train[:10%]"
        return (list(files), options.get("text", "text")) if files else None
    return (_match(path), options.get("text", "text")) if scheme == "file" else None


def _parse(url: str) -> tuple[str, str, dict[str, str]]:
    match = _URL.fullmatch(url)
    if not match or match["scheme"] not in _SCHEMES:
        raise BadInput(f"source {url!r} is not understood: begin it with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    if not match["path"].strip("/ "):
        what = {"file": "files", "hf": "a dataset"}.get(match["scheme"], "a name")
        raise BadInput(f"source {url!r} names nothing: {match['scheme']}:// is followed by {what}")
    known_options = _SCHEMES[match["scheme"]][1]
    query = (match["options"] or "").replace("+", "%2B")  # a form's "+" is a space; ours is a plus
    try:
        options = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
    except ValueError as error:
        raise BadInput(f"source {url!r}: options are written ?key=value&key=value") from error
    if unknown := options.keys() - known_options:
        raise BadInput(f"source {url!r} has unknown option {min(unknown)!r}: there are {', '.join(known_options) or 'none'}")
    if options.get("tree", "oasst") != "oasst":
        raise BadInput(f"source {url!r}: tree={options['tree']} is not known: there is oasst")
    if "lang" in options and "tree" not in options:
        raise BadInput(f"source {url!r}: lang chooses among trees: add &tree=oasst, or leave it out")
    return match["scheme"], match["path"], options


def _deal(count: int, rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """Which of `count` files this rank reads, as (file, its first document, step)."""
    if count >= world_size:
        return [(number, 0, 1) for number in range(rank, count, world_size)]
    number = rank % count
    return [(number, rank // count, -(-(world_size - number) // count))]  # as many steps as there are ranks on this file


def _read_builtin(name: str, rank: int, world_size: int, columns: list[str] | None, **options: str) -> Iterator[tuple[str, dict]]:
    if name in _GENERATED:
        yield from _generated(name, rank, world_size, **options)
        return
    if options:
        raise BadInput(f"builtin://{name} is all there is of it: {min(options)} is an option of {', '.join(_GENERATED)}")
    for document_id, text in builtin.read(name, rank, world_size):
        yield f"builtin://{document_id}", {"text": text}


def _generated(
    name: str, rank: int, world_size: int, rows: str = "1000", split: str = "train", tasks: str = ",".join(reasoning.TASKS)
) -> Iterator[tuple[str, dict]]:
    if not rows.isdecimal() or split not in ("train", "test"):
        raise BadInput(f"builtin://{name}?rows={rows}&split={split}: rows is a number, and split is train or test")
    among = [position for position, task in enumerate(reasoning.TASKS) if task in tasks.split(",")]
    if not set(tasks.split(",")) <= set(reasoning.TASKS) or (name not in ("math", "right_or_wrong") and len(among) < len(reasoning.TASKS)):
        raise BadInput(f"builtin://{name}?tasks={tasks}: tasks is for math and right_or_wrong, some of {', '.join(sorted(set(reasoning.TASKS)))}")
    for row in range(rank, int(rows), world_size):
        index = row // len(among) * len(reasoning.TASKS) + among[row % len(among)]
        yield f"builtin://{name}/{split}:{index + 1}", _GENERATED[name](split, index)


def _read_files(pattern: str, rank: int, world_size: int, columns: list[str] | None) -> Iterator[tuple[str, dict | BadInput]]:
    paths = _match(pattern)
    readers = [_reader(path) for path in paths]  # an unknown extension is found before any work is done
    for number, first, step in _deal(len(paths), rank, world_size):
        yield from readers[number](paths[number], columns, first, step)


def _match(pattern: str) -> list[str]:
    if paths := _matches(pattern):
        return paths
    folder = os.path.isdir(os.path.expanduser(pattern))
    hint = f"it is a directory; name its files, as in {pattern.rstrip('/')}/*.jsonl" if folder else "check the path"
    raise BadInput(f"no file matches file://{pattern}: {hint}")


def _matches(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return [path]
    # "[2024]" is a name, or else a pattern for one character: of each part of the path on its own.
    readings = [(part.replace("[", "[[]"), part) if "[" in part else (part,) for part in path.split("/")]
    for parts in itertools.product(*readings):
        found = glob.glob("/".join(parts), recursive=True)
        if paths := sorted({path for path in found if os.path.isfile(path)}):  # two ** find a file twice
            return paths
    return []


def is_readable(path: str) -> bool:
    return path.endswith(tuple(_READERS))


def _reader(path: str) -> Callable[[str, list[str] | None, int, int], Iterator[tuple[str, dict | BadInput]]]:
    for extension, reader in _READERS.items():
        if path.endswith(extension):
            return reader
    raise BadInput(f"{path}: unknown file extension: there are {', '.join(_READERS)}")


def _read_txt(path: str, columns: list[str] | None, first: int, step: int) -> Iterator[tuple[str, dict]]:
    if first % step == 0:
        try:
            yield path, {"text": Path(path).read_bytes().decode("utf-8-sig")}  # Windows programs put a byte order mark in front
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise BadInput(f"{path}:{line}: invalid UTF-8: convert the file to UTF-8") from error
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(path: str, columns: list[str] | None, first: int, step: int) -> Iterator[tuple[str, dict | BadInput]]:
    for number, line in enumerate(_lines(path)):
        if number % step == first and not line.isspace():
            where = f"{path}:{number + 1}"
            yield where, json_object(line, where)


def json_object(line: bytes, where: str) -> dict | BadInput:
    """The object of a line of JSON Lines; what is wrong with it, for the caller to raise."""
    try:
        record = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError:
        return BadInput(f"{where}: invalid UTF-8: convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return BadInput(f"{where}: malformed JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; brackets in brackets in brackets ...
        return BadInput(f"{where}: the line cannot be read: {error}")
    if not isinstance(record, dict):
        return BadInput(f"{where}: a line must hold a JSON object, not a {type(record).__name__}")
    return record


def _lines(path: str) -> Iterator[bytes]:
    try:
        if path.endswith((".gz", ".zst")) and os.path.getsize(path) == 0:
            raise EOFError("it is empty, and not even packed")
        with open(path, "rb") as stored, unpacked(stored, path) as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read to its end, or is cut off: {error}") from error


def unpacked(stored: BinaryIO, path: str) -> BinaryIO:
    """The contents of a file that is packed as its name says, or not packed."""
    if path.endswith(".gz"):
        return gzip.open(stored)
    if path.endswith(".xz"):
        return lzma.open(stored)
    if path.endswith(".zst"):
        return io.BufferedReader(_Unzstd(stored), 2**20)
    return stored


class _Unzstd(io.RawIOBase):
    """The contents of a .zst file. pyarrow's reader refuses windows over 128 MB (`zstd --long=31`), and zstandard's
    own ends without an error where a file was cut off."""

    def __init__(self, stored: BinaryIO):
        self._stored, self._packed, self._contents = stored, b"", memoryview(b"")
        self._frame = self._decompressor = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        while not self._contents:
            self._packed = self._packed or self._stored.read(2**17)
            if not self._packed:
                if self._frame:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            try:
                if not self._frame:
                    self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
                    self._frame = self._decompressor.decompressobj()
                self._contents = memoryview(self._frame.decompress(self._packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._contents))
        buffer[:count], self._contents = self._contents[:count], self._contents[count:]
        return count


def _read_parquet(path: str, columns: list[str] | None, first: int, step: int) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for column in columns or []:
                _field(dict.fromkeys(file.schema_arrow.names), column, path)
            row = 0
            for rows in file.iter_batches(_PARQUET_ROWS, columns=columns):  # of a row group, which may be all of the file
                values = dict(zip(rows.schema.names, rows.columns))
                for index in range((first - row) % step, rows.num_rows, step):
                    yield f"{path}:{row + index + 1}", {name: _present(column[index].as_py()) for name, column in values.items()}
                row += rows.num_rows
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{row + index + 1}: invalid UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is damaged or no Parquet file: {error}") from error


def _read_hub(
    path: str, rank: int, world_size: int, columns: list[str] | None,
    name: str | None = None, split: str = "train", data_dir: str | None = None, file: str | None = None,
) -> Iterator[tuple[str, dict | BadInput]]:  # fmt: skip
    import datasets
    import httpx
    import huggingface_hub
    import huggingface_hub.errors
    import pyarrow

    huggingface_hub.utils.logging.set_verbosity_error()  # it would narrate every retry
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it would log what it raises
    if path.startswith("/") and not os.path.isdir(path):
        raise BadInput(f"hf://{path} is no folder: check the path, or write hf://OWNER/NAME for a dataset on the hub")
    if path.startswith("/") and "[" in path and not file:
        raise BadInput(f"hf://{path}: datasets takes brackets for a pattern: rename the folder, or name its files as file://{path}/...")
    last = None
    try:
        if file:  # its records may differ in their fields' types, which datasets does not take
            local = os.path.join(path, file) if path.startswith("/") else huggingface_hub.hf_hub_download(path, file, repo_type="dataset")
            yield from _read_jsonl(local, columns, rank, world_size)
            return
        dataset = datasets.load_dataset(path, name=name, data_dir=data_dir, split=split, streaming=True)
        for shard, first, step in _deal(dataset.num_shards, rank, world_size):
            for number, record in enumerate(dataset.shard(num_shards=dataset.num_shards, index=shard)):
                last = f"hf://{path}/{split}/{shard}:{number + 1}"
                if number % step == first:
                    yield last, {name: _present(value) for name, value in record.items()}
    except (
        OSError, ValueError, TypeError, RuntimeError, httpx.HTTPError, pyarrow.ArrowException, datasets.exceptions.DatasetsError,
        huggingface_hub.errors.HfHubHTTPError,
    ) as error:  # fmt: skip
        # datasets takes the type of a field from the first rows, and reads many rows at once
        if isinstance(error, (TypeError, pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError)):
            after = f"after {last}" if last else "from its first row"
            lines = f"file://{path}/**/*.jsonl" if path.startswith("/") else f"hf://{path}?file=NAME.jsonl"
            raise BadInput(
                f"hf://{path} cannot be read {after} ({_first_line(error)}): a row is damaged, or a field changes its type; "
                f"of JSON Lines, {lines} reads rows whatever their types, and names a damaged one"
            ) from error
        if path.startswith("/"):
            hint = "it must hold .jsonl, .parquet or .txt files in the hub's layout"
        else:
            hint = f"check the name and the network; for a gated dataset accept its terms on https://huggingface.co/datasets/{path} and set HF_TOKEN"
        raise BadInput(f"hf://{path} cannot be read ({_first_line(error)}): {hint}") from error


def _read_tfds(
    path: str, rank: int, world_size: int, columns: list[str] | None, split: str = "train", data_dir: str | None = None
) -> Iterator[tuple[str, dict]]:
    os.environ.setdefault("NO_GCE_CHECK", "true")  # without a network it waits for Google's metadata server otherwise
    import tensorflow_datasets as tfds

    try:
        dataset = tfds.data_source(path, split=split, data_dir=data_dir, download=False)
    except (OSError, ValueError, AssertionError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise BadInput(
            f"tfds://{path} cannot be read ({_first_line(error)}): check name and split, and prepare it once with "
            f'python -c "import tensorflow_datasets as tfds; tfds.data_source({path!r}{where})"'
        ) from error
    for number in range(rank, len(dataset), world_size):
        where, record = f"tfds://{path}/{split}:{number + 1}", dataset[number]
        texts = [name for name in columns or record if isinstance(record.get(name), bytes)]  # others may be bytes that are no text
        try:
            yield where, record | {name: record[name].decode() for name in texts}
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: invalid UTF-8") from error


def _present(value: Any) -> Any:
    """A field's value without the nulls inside: Arrow fills up each object with the keys of all others in its column."""
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value


def text_of(record: dict, field: str, where: str) -> str:
    """A record's text. Raises `BadInput` where there is none."""
    text = _field(record, field, where)
    if not isinstance(text, str):
        raise BadInput(f"{where}: the text is of type {type(text).__name__}, not a string: choose its field with ?text=FIELD")
    return text


def _field(record: dict, field: str, where: str):
    if field not in record:
        raise BadInput(f"{where}: no field {field!r}: choose one of {', '.join(map(str, record)) or '(none)'} with ?text=FIELD")
    return record[field]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# Made to order, a row at a time
_GENERATED = {"tools": tool_conversations.conversations, "math": reasoning.conversations, "right_or_wrong": reasoning.preferences,
              "transcripts": tool_conversations.transcript}  # fmt: skip
_READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".json.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
_SCHEMES = {
    "builtin": (_read_builtin, ("rows", "split", "tasks")),
    "file": (_read_files, ("text", "tree", "lang")),
    "hf": (_read_hub, ("text", "name", "split", "data_dir", "file", "tree", "lang")),
    "tfds": (_read_tfds, ("text", "split", "data_dir")),
}
