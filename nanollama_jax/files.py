"""Files that are complete or absent, and folders that only one process at a time works in."""

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
    """A file to write, moved to `path` once it is complete and on disk. A failure changes nothing.

    Creates the folder. Removes leftovers of the same file from killed processes of this host.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    for other in path.parent.iterdir():
        process = other.name.removeprefix(prefix).removesuffix(".tmp")
        is_temporary = other.name == f"{prefix}{process}.tmp" and process.isdecimal()
        if is_temporary and _start_time(int(process)) is None:
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
    """`path`, absolute. For checking it before the work whose result goes there.

    Raises BadInput if nothing can be written there: an empty name, a path below a file, in a
    folder without write permission or in a checkpoint, or a device.
    """
    if not os.fspath(path):
        raise BadInput(f"{flag} is empty: name what to write")
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise BadInput(f"{flag} {path} is a device or a pipe: choose another name")
    folder = next((folder for folder in path.parents if os.path.lexists(folder)), path)
    if not folder.is_dir():
        raise BadInput(f"{flag} {path}: {folder} is not a folder: choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(
            f"{flag} {path}: {folder} cannot be written: choose another name, or change its "
            "permissions"
        )
    for folder in path.parents:
        if (folder / "_CHECKPOINT_METADATA").exists():
            raise BadInput(f"{flag} {path} is in the checkpoint {folder}: choose another name")
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
def locked(path: str | os.PathLike, message: str) -> Iterator[None]:
    """Inside, this process holds the lock on a file; others get a BadInput with `message`.

    The lock ends with the process, however that ends. On a file system without locks (some NFS and
    Lustre) the file `PATH.held` serves as the lock: see `_held`.
    """
    with open(path, "w") as file, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(message) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            held = Path(f"{os.fspath(path)}.held")
            console.print(
                f"{held.parent}: no file locks here ({error.strerror}); {held} is the lock instead"
            )
            stack.enter_context(_held(held, message))
        yield


@contextlib.contextmanager
def _held(path: Path, message: str) -> Iterator[None]:
    """Inside, `path` exists and names this process; taken over from a killed one of this host."""
    mine = {"host": _host(), "pid": os.getpid(), "started": _start_time(os.getpid())}
    content = json.dumps(mine).encode()
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        if (theirs := _holder(path)) is None or theirs["host"] != mine["host"]:
            who = "the process that created it"
            if theirs:
                who = f"process {theirs['pid']} on {theirs['host'].partition(' ')[0]}"
            raise BadInput(f"{message}; if {who} has ended, remove {path}") from None
        if _start_time(theirs["pid"]) == theirs["started"]:
            raise BadInput(message) from None
        with whole_file(path) as file:
            file.write(content)
        time.sleep(_TAKE_OVER_SECONDS)  # of several that take over, the last to write holds it
        if _holder(path) != mine:
            raise BadInput(message) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock file; None if it does not say."""
    try:
        found = json.loads(path.read_bytes())
        return {"host": str(found["host"]), "pid": int(found["pid"]), "started": found["started"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _host() -> str:
    """The host's name; on Linux also its boot and its PID namespace.

    Containers can share a name without seeing each other's processes.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in ticks since boot; None if it has ended.

    Without /proc: "" if a process has this number.
    """
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
