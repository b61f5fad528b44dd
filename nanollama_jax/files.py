"""Files that are there whole or not at all, whatever happens while they are written, and folders that one process works in at a time."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanollama_jax.errors import BadInput


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes its place at `path` once it is written and on the disk; its folder is made. A failure leaves what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def output_path(path: str | os.PathLike, flag: str = "--out") -> Path:
    """`path`, absolute, before the work whose result goes there. Raises BadInput where nothing can be written: an empty name, below a file or in a
    folder that cannot be written, in a checkpoint, or over a device."""
    if not os.fspath(path):
        raise BadInput(f"{flag} is empty: name what to write")
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise BadInput(f"{flag} {path} is a device or a pipe: choose another name")
    folder = next((folder for folder in path.parents if os.path.lexists(folder)), path)
    if not folder.is_dir():
        raise BadInput(f"{flag} {path}: {folder} is no folder: choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{flag} {path}: {folder} cannot be written: choose another name, or change its permissions")
    if checkpoint := next((folder for folder in path.parents if (folder / "_CHECKPOINT_METADATA").exists()), None):
        raise BadInput(f"{flag} {path} is in the checkpoint {checkpoint}: choose another name")
    return path


def output_file(path: str | os.PathLike, flag: str = "--out") -> Path:
    """`output_path`, also refusing a folder."""
    path = output_path(path, flag)
    if path.is_dir():
        raise BadInput(f"{flag} {path} is a folder: name a file in it")
    return path


def write_json(path: str | os.PathLike, content: Any) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


@contextlib.contextmanager
def locked(path: str | os.PathLike, else_say: str) -> Iterator[None]:
    """Inside, no other process comes past a lock on this file: it gets `else_say` as a BadInput. The lock goes with the process, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(else_say) from error
        yield
