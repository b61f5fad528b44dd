"""How bad input is reported: one line that says what is wrong and what to change, and a non-zero exit.

Code that finds a user's mistake (a missing corpus, a batch that the mesh cannot split, a damaged shard) raises `BadInput`;
commands run inside `one_line_errors`, which prints it without a traceback. Any other exception is a bug and keeps its traceback.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags, logging

from nanollama_jax import process
from nanollama_jax.console import console, error_console


class BadInput(Exception):
    """The user's input is wrong; the message is one line: what is wrong, and what to change."""


class RunStopped(Exception):
    """A run stopped itself (a gate, updates that stay non-finite); the message is one line: why, and how to go on. Nothing saved is lost."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with a module's docstring as its help; a mistake on the command line is one line on stderr and exit status 2."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        for word in sys.argv[1:]:
            if word.startswith("--") and word.endswith("=--"):  # argparse would make a list of it
                self.error(f"argument {word.removesuffix('=--')}: expected one argument")
        return super().parse_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        error_console.print(
            f"error: command line: {' '.join(message.split())} (--help lists the flags)"
        )
        sys.exit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns `BadInput`, and what the operating system refuses, into one line on stderr and exit status 2; `RunStopped` into one and status 3.

    Inside, absl's log is silent: Orbax narrates through it, and writes the traceback of an error there that it also raises.
    """
    logging.set_verbosity(logging.FATAL)
    try:
        if strange := next(
            (word for word in sys.argv if word != word.encode(errors="ignore").decode()), None
        ):
            raise BadInput(
                f"{strange!r} on the command line is not UTF-8: rename it, or set PYTHONUTF8=1 if the terminal is UTF-8"
            )
        yield
    except OSError as error:
        if error.strerror is None:  # not from the operating system
            raise
        where = f" ({' '.join(str(error.filename).split())})" if error.filename else ""
        error_console.print(
            f"error: {error.strerror}{where}: mend that and run the same command again; what was saved is whole"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        process.exit_interrupted()
    except (BadInput, RunStopped) as error:
        error_console.print(f"error: {' '.join(str(error).split())}")
        sys.exit(2 if isinstance(error, BadInput) else 3)


def flags_parser(config: flags.FlagHolder) -> Callable[[list[str]], list[str]]:
    """For `app.run`: parses as absl does, but a mistake on the command line, or a recipe that does not load, ends in one line."""

    from nanollama_jax.config import check  # which imports this module

    def parse(argv: list[str]) -> list[str]:
        if "--help" in argv or "-h" in argv:
            console.print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}")
            sys.exit(0)
        with one_line_errors():
            try:
                rest = flags.FLAGS(argv)
                if len(rest) > 1:
                    raise ValueError(
                        f"unexpected argument {rest[1]!r}: overrides are written --config.NAME=VALUE"
                    )
                if config.value is None:
                    raise ValueError(
                        "there is no --config: try --config configs/curriculum.py:nano"
                    )
                check(config.value)  # a recipe that does not load says so only when it is looked at
                return rest
            except SyntaxError as error:
                where = f"{error.filename}:{error.lineno}"
                raise BadInput(
                    f"command line: {where} is not Python, so not a recipe: {error.msg}"
                ) from None
            except (AttributeError, KeyError) as error:
                raise BadInput(f"command line: {_no_such_name(error, argv)}") from None
            except (flags.Error, ImportError, NameError, TypeError, ValueError, OSError) as error:
                raise BadInput(f"command line: {error}") from None

    return parse


def _no_such_name(error: AttributeError | KeyError, argv: list[str]) -> str:
    """The override in `argv` that there is no setting for; where none is to blame, why the recipe does not load."""
    from nanollama_jax.config import did_you_mean

    said = str(error.args[0])
    named = re.findall(r"[\w.+-]+", said)[:1]  # ml_collections begins with the name
    near = re.search(r'Did you mean "(.+?)"', said)
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--config.")
        if name != argument and set(named) & set(name.split(".")):
            hint = did_you_mean(name) or (f"; did you mean {near[1]}?" if near else "")
            return f"there is no such name in this config: {name}{hint}"
    return f"the recipe does not load: {said}"
