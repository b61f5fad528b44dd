"""How bad input is reported: one line that says what is wrong and what to change.

Code that finds a user's mistake (a missing corpus, a batch that the mesh cannot split, a damaged
shard) raises `BadInput`. Commands run inside `one_line_errors`, which prints it without a traceback
and exits with a non-zero status. Any other exception is a bug and keeps its traceback.
"""

import contextlib
import sys
from collections.abc import Iterator

from nanollama_jax import process
from nanollama_jax.console import error_console


class BadInput(ValueError):
    """The user's input is wrong. The message is one line: what is wrong, and what to change."""


class RunStopped(Exception):
    """A run stopped itself: a gate failed, or updates stayed non-finite. Saved files are intact.

    The message is one line: why it stopped, and how to continue.
    """


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Reports expected errors as one line on stderr, without a traceback.

    `BadInput` and errors of the operating system exit with status 2, `RunStopped` with 3, Ctrl-C
    with 130. absl's log is silenced inside: Orbax logs the traceback of errors that it also raises.
    """
    from absl import logging  # not at the top: importing the package must not load absl

    logging.set_verbosity(logging.FATAL)
    try:
        for word in sys.argv:
            if word != word.encode(errors="ignore").decode():
                raise BadInput(
                    f"{word!r} on the command line is not UTF-8: rename the file, or set "
                    "PYTHONUTF8=1 if the terminal uses UTF-8"
                )
        yield
    except OSError as error:
        if error.strerror is None:  # not from the operating system
            raise
        where = f" ({' '.join(str(error.filename).split())})" if error.filename else ""
        error_console.print(
            f"error: {error.strerror}{where}: fix this and rerun; saved files are intact"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        process.exit_interrupted()
    except (BadInput, RunStopped) as error:
        error_console.print(f"error: {' '.join(str(error).split())}")
        sys.exit(2 if isinstance(error, BadInput) else 3)
