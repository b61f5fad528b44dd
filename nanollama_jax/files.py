"""Files that are there whole or not at all, whatever happens while they are written, and folders that one process works in at a time."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanollama_jax.console import console
from nanollama_jax.errors import BadInput

_TAKE_OVER_SECONDS = 0.5


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
        if (
            other.name == f"{prefix}{process}.tmp"
            and process.isdecimal()
            and _start_of(int(process)) is None
        ):
            other.unlink(missing_ok=True)
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
        raise BadInput(
            f"{flag} {path}: {folder} cannot be written: choose another name, or change its permissions"
        )
    if checkpoint := next(
        (folder for folder in path.parents if (folder / "_CHECKPOINT_METADATA").exists()), None
    ):
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
    """Inside, no other process comes past a lock on this file: it gets `else_say` as a BadInput. The lock goes with the process, however it ends.

    On a file system without locks (some of NFS and Lustre) a file `PATH.held` is the lock instead: see `_held`.
    """
    with open(path, "w") as file, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(else_say) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            held = Path(f"{os.fspath(path)}.held")
            console.print(
                f"{held.parent}: no locks here ({error.strerror}): {held} keeps other processes out instead"
            )
            stack.enter_context(_held(held, else_say))
        yield


@contextlib.contextmanager
def _held(path: Path, else_say: str) -> Iterator[None]:
    """Inside, `path` exists and names this process. One that a process of this machine left when it was killed is taken over."""
    mine = {"host": _host(), "pid": os.getpid(), "started": _start_of(os.getpid())}
    content = json.dumps(mine).encode()
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        if (theirs := _holder(path)) is None or theirs["host"] != mine["host"]:
            who = (
                f"process {theirs['pid']} on {theirs['host'].partition(' ')[0]}"
                if theirs
                else "the process that began it"
            )
            raise BadInput(f"{else_say}; if {who} is over, remove {path}") from None
        if _start_of(theirs["pid"]) == theirs["started"]:
            raise BadInput(else_say) from None
        with whole_file(path) as file:
            file.write(content)
        time.sleep(_TAKE_OVER_SECONDS)  # of several that take it over, the last one has it
        if _holder(path) != mine:
            raise BadInput(else_say) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock file; None where it does not say."""
    try:
        found = json.loads(path.read_bytes())
        return {"host": str(found["host"]), "pid": int(found["pid"]), "started": found["started"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _host() -> str:
    """The machine's name; on Linux also its boot and the PID namespace: containers can share a name and not see each other's processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot; None if it is over. Without /proc: "" if there is one of this number."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
