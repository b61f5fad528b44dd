"""How bad input is reported: one line that says what is wrong and what to change, and a non-zero exit.

Code that finds a user's mistake (a missing corpus, a batch that the mesh cannot split, a damaged shard) raises `BadInput`;
commands run inside `one_line_errors`, which prints it without a traceback. Any other exception is a bug and keeps its traceback.
"""

import contextlib
import errno
import sys
from collections.abc import Iterator


class BadInput(Exception):
    """The user's input is wrong; the message is one line: what is wrong, and what to change."""


class RunStopped(Exception):
    """A run stopped itself (a gate, updates that stay non-finite); the message is one line: why, and how to go on. Nothing saved is lost."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns `BadInput` (and a full disk) into one line on stderr and exit status 2, `RunStopped` into one and exit status 3."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: no space left on the disk of {error.filename or 'the workdir'}: free some and run the same command again", file=sys.stderr)
        sys.exit(2)
    except (BadInput, RunStopped) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 3)
