"""Files that are there whole or not at all, whatever happens while they are written, and folders that one process works in at a time."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanollama_jax.errors import BadInput


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes its place at `path` once it is written and on the disk; its folder is made. A failure leaves what was there.

    What processes of this host that were killed had begun of the same file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    for other in path.parent.iterdir():
        process = other.name.removeprefix(prefix).removesuffix(".tmp")
        if other.name == f"{prefix}{process}.tmp" and process.isdecimal() and not _runs(int(process)):
            other.unlink(missing_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


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
