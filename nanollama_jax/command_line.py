"""What commands share: flags, and how a mistake on the command line is reported.

Commands with a few flags of their own use argparse; those that take a recipe (--config) use absl,
because ml_collections defines a flag for every value of the recipe.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from nanollama_jax.console import console, error_console
from nanollama_jax.errors import BadInput, one_line_errors

if TYPE_CHECKING:  # imported where they are used: `nanollama generate` needs no absl, others no jax
    from absl import flags

    from nanollama_jax.infer.sampling import Sampling


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with a module's docstring as help.

    A mistake on the command line is one line on stderr and exit status 2.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def add_checkpoint(self) -> None:
        self.add_argument(
            "--checkpoint",
            required=True,
            metavar="DIR",
            help="a workdir (its latest checkpoint), or WORKDIR/checkpoints/step_N",
        )

    def add_sampling(self) -> None:
        """A flag for each field of `Sampling`; `sampling` builds one from them."""
        from nanollama_jax.infer.sampling import Sampling

        for field in dataclasses.fields(Sampling):
            self.add_argument(
                f"--{field.name}",
                type=field.type,
                default=field.default,
                help="default: %(default)s",
            )

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        for word in sys.argv[1:]:
            if word.startswith("--") and word.endswith("=--"):  # argparse would make it a list
                self.error(f"argument {word.removesuffix('=--')}: expected one argument")
        return super().parse_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        error_console.print(
            f"error: command line: {' '.join(message.split())} (--help lists the flags)"
        )
        sys.exit(2)


def sampling(arguments: argparse.Namespace) -> "Sampling":
    """From the flags of `ArgumentParser.add_sampling`. Raises `BadInput` for a bad value."""
    from nanollama_jax.infer.sampling import Sampling

    return Sampling(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)}
    )


def named_urls(arguments: list[str]) -> dict[str, str]:
    """The NAME=URL values of --benchmark. Raises `BadInput` for a malformed or repeated one."""
    for argument in arguments:
        if "=" not in argument:
            raise BadInput(
                f"--benchmark {argument}: write NAME=URL, as in gsm8k=file://gsm8k/test.jsonl"
            )
    named = dict(argument.split("=", 1) for argument in arguments)
    if len(named) < len(arguments):
        raise BadInput("--benchmark: a name is given twice: write gsm8k=URL and gsm8k_2=URL")
    return named


def flags_parser(
    config: "flags.FlagHolder",
    module: str = "__main__",
    instead: "flags.FlagHolder | None" = None,
) -> Callable[[list[str]], list[str]]:
    """A `flags_parser` for `absl.app.run`, for a command that takes a recipe.

    It parses as absl does, but --help prints the docstring and the flags of `module`, and a mistake
    on the command line or a recipe that does not load is reported as one line.

    Args:
      config: the flag of the recipe, which is required and checked.
      module: the module that defines the command's flags.
      instead: a flag that may be given in place of the recipe.
    """
    from absl import flags

    from nanollama_jax.config import check

    def parse(argv: list[str]) -> list[str]:
        if "--help" in argv or "-h" in argv:
            listed = flags.FLAGS.module_help(argv[0] if module == "__main__" else module)
            console.print(f"{sys.modules[module].__doc__}\n{listed}")
            sys.exit(0)
        with one_line_errors():
            try:
                rest = flags.FLAGS(argv)
                if len(rest) > 1:
                    raise ValueError(
                        f"unexpected argument {rest[1]!r}: overrides are written "
                        "--config.NAME=VALUE"
                    )
                if instead is not None and instead.value is not None:
                    if config.value is not None:
                        raise ValueError(f"give either --config or --{instead.name}")
                    return rest
                if config.value is None:
                    raise ValueError("--config is missing: try --config configs/curriculum.py:nano")
                check(config.value)  # ml_collections reports a load error at the first access
                return rest
            except SyntaxError as error:
                raise BadInput(
                    f"command line: {error.filename}:{error.lineno} is not Python, so not a "
                    f"recipe: {error.msg}"
                ) from None
            except (AttributeError, KeyError) as error:
                raise BadInput(f"command line: {_no_such_name(error, argv)}") from None
            except (flags.Error, ImportError, NameError, TypeError, ValueError, OSError) as error:
                raise _raised_by_recipe(error) or BadInput(f"command line: {error}") from None

    return parse


def _raised_by_recipe(error: BaseException | None) -> BadInput | None:
    """The `BadInput` behind `error`.

    ml_collections and absl raise their own errors from a recipe's ValueError, with its traceback as
    text in the message.
    """
    found = None
    while error is not None:
        found = error if isinstance(error, BadInput) else found
        error = error.__context__
    return found


def _no_such_name(error: AttributeError | KeyError, argv: list[str]) -> str:
    """The override in `argv` that names no setting; if there is none, why the recipe fails."""
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
