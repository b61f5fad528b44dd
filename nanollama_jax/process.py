"""The process around a run: output that never fails or blocks, and Ctrl-C in one line.

Imports nothing heavy, so that it can be set up first.
"""

import contextlib
import io
import os
import select
import signal
import sys
from typing import Any, NoReturn


class _Lossy(io.FileIO):
    """A raw stream that drops what cannot be written.

    A closed pipe, a lost terminal, a full disk, a reader that does not read for a second.
    """

    _patience = 1.0  # seconds

    def write(self, data: Any) -> int:
        try:
            ready = select.select([], [self], [], self._patience)[1]
            self._patience = 1.0 if ready else 0.0
            # PIPE_BUF: what a ready pipe takes without blocking
            written = super().write(data[: select.PIPE_BUF]) if ready else None
        except OSError:
            written = None
        return written or len(data)


def keep_output_from_failing() -> None:
    """Makes writing to stdout and stderr neither raise nor block: a run continues without them."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # Takes the lowest free number, this one. Otherwise the next file opened would get it,
            # and with it what is printed
            os.open(os.devnull, os.O_RDWR)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)  # None if it was closed
        encoding = stream.encoding if stream else "utf-8"
        errors = stream.errors if stream else "backslashreplace"
        with contextlib.suppress(OSError):  # not a terminal
            # A ready terminal may take less than it is given, and then block. Opened again, because
            # the shell shares the flags of the descriptor it gave us
            fd = os.open(os.ttyname(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        buffer = io.BufferedWriter(_Lossy(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors, line_buffering=True))


def say(line: str) -> None:
    """Prints a line to stderr at once.

    For signal handlers: they may interrupt a write to `sys.stderr`, which is not reentrant.
    """
    _Lossy(2, "w", closefd=False).write(f"{line}\n".encode())


def exit_interrupted(*_: Any) -> NoReturn:
    """Prints one line and exits with status 130, as a SIGINT handler or for a KeyboardInterrupt.

    Skips Python's own shutdown: an exception in the middle of jax's imports, or a shutdown while
    its threads run, ends in a segmentation fault.
    """
    show_cursor = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    say(f"{show_cursor}error: interrupted; saved files are intact")
    os._exit(130)


def set_up() -> None:
    signal.signal(signal.SIGINT, exit_interrupted)
    keep_output_from_failing()
