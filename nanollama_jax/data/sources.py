"""Where raw text comes from: one function reads any source URL as datatrove documents, divided among ranks.

    builtin://docs                       also builtin://code and builtin://reasoning: see data/builtin.py
    file://texts/**/*.jsonl.zst          a path or glob, relative or absolute: .txt (a file is one document), .jsonl and
                                         .jsonl.gz, .xz, .zst (a line is one document), .parquet (a row is one document)
    hf://OWNER/NAME?name=SUBSET          streamed from the Hugging Face hub; hf:///PATH is a local folder laid out as on the hub
    tfds://NAME?data_dir=PATH            a TensorFlow Datasets set prepared as array_record; TensorFlow itself is not needed

Options follow a question mark: `text=FIELD` names the field with the text ("text"); `split`, `name` and `data_dir` mean what they
mean to the library that reads. Whatever is wrong with the data raises `BadInput` that names the file and line; only documents
without any visible text are passed over. Ranks read different files where there are enough; where there are fewer files than ranks,
each rank opens a single file, and the ranks that share it take its documents in turn.
"""

import glob
import gzip
import io
import json
import lzma
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from datatrove.data import Document

from nanollama_jax.data import builtin
from nanollama_jax.errors import BadInput

# A question mark is also a glob's wildcard: options begin at one that is followed by "word=".
_URL = re.compile(r"(?P<scheme>\w+)://(?P<path>.*?)(?:\?(?P<options>\w+=.*))?", re.DOTALL)


def read_documents(url: str, rank: int, world_size: int) -> Iterator[Document]:
    """Yields this rank's documents of `url`, always the same in the same order; ids are the same for any `world_size`.

    Raises `BadInput` for a URL that cannot be read and for text that is not clean UTF-8, when it comes to it.
    """
    scheme, path, options = _parse(url)
    for where, text in _SCHEMES[scheme][0](path, rank, world_size, **options):
        if not isinstance(text, str):
            raise BadInput(f"{where}: the text is of type {type(text).__name__}, not a string: choose its field with ?text=FIELD")
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


def matched_files(url: str) -> list[str] | None:
    """The files that a file:// URL stands for, sorted; None for other schemes."""
    scheme, path, _ = _parse(url)
    return _match(path) if scheme == "file" else None


def _parse(url: str) -> tuple[str, str, dict[str, str]]:
    match = _URL.fullmatch(url)
    if not match or match["scheme"] not in _SCHEMES:
        raise BadInput(f"source {url!r} is not understood: begin it with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    known_options = _SCHEMES[match["scheme"]][1]
    query = (match["options"] or "").replace("+", "%2B")  # a form's "+" is a space; ours is a plus
    try:
        options = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
    except ValueError as error:
        raise BadInput(f"source {url!r}: options are written ?key=value&key=value") from error
    if unknown := options.keys() - known_options:
        raise BadInput(f"source {url!r} has unknown option {min(unknown)!r}: there are {', '.join(known_options) or 'none'}")
    return match["scheme"], match["path"], options


def _deal(count: int, rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """Which of `count` files this rank reads, as (file, its first document, step)."""
    if count >= world_size:
        return [(number, 0, 1) for number in range(rank, count, world_size)]
    number = rank % count
    return [(number, rank // count, -(-(world_size - number) // count))]  # as many steps as there are ranks on this file


def _read_builtin(name: str, rank: int, world_size: int) -> Iterator[tuple[str, str]]:
    for document_id, text in builtin.read(name, rank, world_size):
        yield f"builtin://{document_id}", text


def _read_files(pattern: str, rank: int, world_size: int, text: str = "text") -> Iterator[tuple[str, str]]:
    paths = _match(pattern)
    readers = [_reader(path) for path in paths]  # an unknown extension is found before any work is done
    for number, first, step in _deal(len(paths), rank, world_size):
        yield from readers[number](paths[number], text, first, step)


def _match(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return [path]
    paths = sorted({found for found in glob.glob(path, recursive=True) if os.path.isfile(found)})  # two ** find a file twice
    if not paths:
        hint = f"it is a directory; name its files, as in {pattern.rstrip('/')}/*.jsonl" if os.path.isdir(path) else "check the path"
        raise BadInput(f"no file matches file://{pattern}: {hint}")
    return paths


def _reader(path: str) -> Callable[[str, str, int, int], Iterator[tuple[str, str]]]:
    for extension, reader in _READERS.items():
        if path.endswith(extension):
            return reader
    raise BadInput(f"{path}: unknown file extension: there are {', '.join(_READERS)}")


def _read_txt(path: str, field: str, first: int, step: int) -> Iterator[tuple[str, str]]:
    if first % step == 0:
        try:
            yield path, Path(path).read_bytes().decode("utf-8-sig")  # Windows programs put a byte order mark in front
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise BadInput(f"{path}:{line}: invalid UTF-8: convert the file to UTF-8") from error
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(path: str, field: str, first: int, step: int) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path)):
        if number % step == first and not line.isspace():
            where = f"{path}:{number + 1}"
            yield where, _json_text(line, field, where)


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: invalid UTF-8: convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; brackets in brackets in brackets ...
        raise BadInput(f"{where}: the line cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise BadInput(f"{where}: a line must hold a JSON object with the text in a field, not a {type(record).__name__}")
    return _field(record, field, where)


def _lines(path: str) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read to its end, or is cut off: {error}") from error


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path)
    if path.endswith(".xz"):
        return lzma.open(path)
    if path.endswith(".zst"):
        import pyarrow  # the zstandard package's reader ends without a word where a file was cut off

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _read_parquet(path: str, field: str, first: int, step: int) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _field(dict.fromkeys(file.schema_arrow.names), field, path)
            row = 0
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=[field]).column(field)
                for index in range((first - row) % step, len(column), step):
                    yield f"{path}:{row + index + 1}", column[index].as_py()
                row += len(column)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{row + index + 1}: invalid UTF-8 in the field {field!r}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is damaged or no Parquet file: {error}") from error


def _read_hub(
    path: str, rank: int, world_size: int, text: str = "text", name: str | None = None, split: str = "train", data_dir: str | None = None
) -> Iterator[tuple[str, str]]:
    import datasets
    import httpx
    import huggingface_hub.errors

    if path.startswith("/") and not os.path.isdir(path):
        raise BadInput(f"hf://{path} is no folder: check the path, or write hf://OWNER/NAME for a dataset on the hub")
    try:
        dataset = datasets.load_dataset(path, name=name, data_dir=data_dir, split=split, streaming=True)
        for shard, first, step in _deal(dataset.num_shards, rank, world_size):
            for number, record in enumerate(dataset.shard(num_shards=dataset.num_shards, index=shard)):
                if number % step == first:
                    where = f"hf://{path}/{split}/{shard}:{number + 1}"
                    yield where, _field(record, text, where)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError, huggingface_hub.errors.HfHubHTTPError) as error:
        if path.startswith("/"):
            hint = "it must hold .jsonl, .parquet or .txt files in the hub's layout"
        else:
            hint = f"check the name and the network; for a gated dataset accept its terms on https://huggingface.co/datasets/{path} and set HF_TOKEN"
        raise BadInput(f"hf://{path} cannot be read ({_first_line(error)}): {hint}") from error


def _read_tfds(
    path: str, rank: int, world_size: int, text: str = "text", split: str = "train", data_dir: str | None = None
) -> Iterator[tuple[str, str]]:
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
        where = f"tfds://{path}/{split}:{number + 1}"
        value = _field(dataset[number], text, where)
        try:
            yield where, value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: invalid UTF-8 in the field {text!r}") from error


def _field(record: dict, field: str, where: str):
    if field not in record:
        raise BadInput(f"{where}: no field {field!r}: choose one of {', '.join(map(str, record)) or '(none)'} with ?text=FIELD")
    return record[field]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


_READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}
_SCHEMES = {
    "builtin": (_read_builtin, ()),
    "file": (_read_files, ("text",)),
    "hf": (_read_hub, ("text", "name", "split", "data_dir")),
    "tfds": (_read_tfds, ("text", "split", "data_dir")),
}
