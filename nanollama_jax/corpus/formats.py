"""Reads local files: plain text, JSON Lines (also packed) and Parquet.

To add a format, write a reader and name its extension in `_READERS`. A reader takes the path, the
names of the fields that are wanted (None: all), the number of the first record and the step to the
next, and yields (where, record); `where` names file and line.
"""

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanollama_jax.errors import BadInput

_PARQUET_ROWS = 64  # in memory at a time: a book has a megabyte

Records = Iterator[tuple[str, dict | BadInput]]


def is_readable(path: str) -> bool:
    """Whether there is a reader for files of this extension."""
    return path.endswith(tuple(_READERS))


def read_files(paths: list[str], rank: int, ranks: int, columns: list[str] | None) -> Records:
    """This rank's records of `paths`. Raises `BadInput` for an unknown extension before reading."""
    readers = [_reader(path) for path in paths]
    for number, first, step in deal(len(paths), rank, ranks):
        yield from readers[number](paths[number], columns, first, step)


def deal(count: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Which of `count` files this rank reads, as (file, its first record, step)."""
    if count >= ranks:
        return [(number, 0, 1) for number in range(rank, count, ranks)]
    number = rank % count
    return [(number, rank // count, -(-(ranks - number) // count))]  # step: ranks on this file


def _reader(path: str) -> Callable[[str, list[str] | None, int, int], Records]:
    for extension, reader in _READERS.items():
        if path.endswith(extension):
            return reader
    raise BadInput(f"{path}: unknown file extension: there are {', '.join(_READERS)}")


def _read_txt(path: str, columns: list[str] | None, first: int, step: int) -> Records:
    if first % step:
        return
    try:
        # Windows programs put a byte order mark in front.
        yield path, {"text": Path(path).read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: invalid UTF-8: convert the file to UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def read_jsonl(path: str, columns: list[str] | None, first: int, step: int) -> Records:
    """Records of JSON Lines; a line that is not a JSON object is yielded as a `BadInput`."""
    for number, line in enumerate(_lines(path)):
        if number % step == first and not line.isspace():
            where = f"{path}:{number + 1}"
            yield where, json_object(line, where)


def json_object(line: bytes, where: str) -> dict | BadInput:
    """The object on a line of JSON Lines, or the `BadInput` for the caller to raise."""
    try:
        record = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError:
        return BadInput(f"{where}: invalid UTF-8: convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return BadInput(f"{where}: malformed JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; deep nesting
        return BadInput(f"{where}: the line cannot be read: {error}")
    if not isinstance(record, dict):
        return BadInput(f"{where}: a line must hold a JSON object, not a {type(record).__name__}")
    return record


def _lines(path: str) -> Iterator[bytes]:
    try:
        if path.endswith((".gz", ".zst")) and os.path.getsize(path) == 0:
            raise EOFError("it is empty, not even a compressed file")
        with open(path, "rb") as stored, unpacked(stored, path) as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read to its end, or is cut off: {error}") from error


def unpacked(stored: BinaryIO, path: str) -> BinaryIO:
    """The uncompressed contents of a file; its extension says how it is compressed, if at all."""
    if path.endswith(".gz"):
        return gzip.open(stored)
    if path.endswith(".xz"):
        return lzma.open(stored)
    if path.endswith(".zst"):
        return io.BufferedReader(_Unzstd(stored), 2**20)
    return stored


class _Unzstd(io.RawIOBase):
    """The contents of a .zst file.

    pyarrow's reader refuses windows over 128 MB (`zstd --long=31`), and zstandard's own ends
    without an error where a file was cut off.
    """

    def __init__(self, stored: BinaryIO):
        self._stored = stored
        self._packed = b""
        self._contents = memoryview(b"")
        self._frame = None

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
                    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
                    self._frame = decompressor.decompressobj()
                self._contents = memoryview(self._frame.decompress(self._packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._contents))
        buffer[:count], self._contents = self._contents[:count], self._contents[count:]
        return count


def _read_parquet(path: str, columns: list[str] | None, first: int, step: int) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for column in columns or []:
                field_of(dict.fromkeys(file.schema_arrow.names), column, path)
            row = 0
            # A row group may be the whole file.
            for rows in file.iter_batches(_PARQUET_ROWS, columns=columns):
                values = dict(zip(rows.schema.names, rows.columns))
                for index in range((first - row) % step, rows.num_rows, step):
                    record = {name: column[index].as_py() for name, column in values.items()}
                    yield f"{path}:{row + index + 1}", without_inner_nulls(record)
                row += rows.num_rows
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{row + index + 1}: invalid UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is damaged or not a Parquet file: {error}") from error


def without_inner_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """`record` without nulls inside its fields: Arrow fills up each object with the keys of all
    other objects in its column."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: present(each) for key, each in value.items() if each is not None}
        return [present(each) for each in value] if isinstance(value, list) else value

    return {name: present(value) for name, value in record.items()}


def text_of(record: dict, field: str, where: str) -> str:
    """A record's text. Raises `BadInput` if there is none."""
    text = field_of(record, field, where)
    if not isinstance(text, str):
        raise BadInput(
            f"{where}: the text is of type {type(text).__name__}, not a string: choose its field "
            "with ?text=FIELD"
        )
    return text


def field_of(record: dict, field: str, where: str) -> Any:
    """A record's field. Raises `BadInput` if there is none of that name."""
    if field not in record:
        raise BadInput(
            f"{where}: no field {field!r}: choose one of "
            f"{', '.join(map(str, record)) or '(none)'} with ?text=FIELD"
        )
    return record[field]


_READERS = {
    ".txt": _read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.xz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".json.gz": read_jsonl,
    ".parquet": _read_parquet,
}
