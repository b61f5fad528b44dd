"""The process around a run: output that never fails or blocks, and Ctrl-C in one line. Imports nothing heavy, so that it can be set up first."""

import contextlib
import io
import os
import select
import signal
import sys
from typing import Any, NoReturn


class _Lossy(io.FileIO):
    """A raw stream that drops what cannot be written: a closed pipe, a lost terminal, a full disk, a reader that does not read for a second."""

    _patience = 1.0  # seconds

    def write(self, data: Any) -> int:
        try:
            ready = select.select([], [self], [], self._patience)[1]
            self._patience = 1.0 if ready else 0.0
            # PIPE_BUF: what a pipe that is ready takes without blocking
            written = super().write(data[: select.PIPE_BUF]) if ready else None
        except OSError:
            written = None
        return written or len(data)


def keep_output_from_failing() -> None:
    """Whatever happens to stdout and stderr, writing to them neither raises nor blocks: a run goes on, and its log.txt has every line."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # takes the lowest free number, this one: else the next file opened would get what is printed
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)  # None if it was closed
        encoding, errors = (
            (stream.encoding, stream.errors) if stream else ("utf-8", "backslashreplace")
        )
        with contextlib.suppress(OSError):  # no terminal
            # One that is ready may take less than it is given, and blocks. Opened anew: the shell shares the flags of the descriptor it gave us
            fd = os.open(os.ttyname(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        buffer = io.BufferedWriter(_Lossy(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors, line_buffering=True))


def say(line: str) -> None:
    """A line on stderr at once. For signal handlers: they may interrupt a write to `sys.stderr`, which cannot be entered twice."""
    _Lossy(2, "w", closefd=False).write(f"{line}\n".encode())


def exit_interrupted(*_: Any) -> NoReturn:
    """One line, and exit status 130 at once, as a SIGINT handler or for a KeyboardInterrupt.

    Without Python's own ending: an exception in the midst of jax's imports, or a shutdown under its threads, ends in a segmentation fault.
    """
    show_cursor = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    say(f"{show_cursor}error: interrupted; saved files are intact")
    os._exit(130)


def set_up() -> None:
    signal.signal(signal.SIGINT, exit_interrupted)
    keep_output_from_failing()
