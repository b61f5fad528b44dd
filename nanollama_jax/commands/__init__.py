"""The `nanollama` command. Each subcommand is a module here, imported only when it runs.

A module's docstring is its help, and the first line of it stands in the list of commands. `main`
parses `sys.argv` and runs the command.
"""

import ast
import difflib
import importlib
import os
import pathlib
import sys
from typing import NoReturn

from nanollama_jax import process

GROUPS = {
    "Train": ("train", "plan"),
    "Prepare data": (
        "prepare-data",
        "inspect-data",
        "check-finetuning-data",
        "train-tokenizer",
        "near-duplicates",
        "decontaminate",
    ),
    "Use a checkpoint": ("generate", "chat", "evaluate", "visualize-attention"),
    "Convert": ("export-hf", "export-gguf", "compare-exports", "import-hf"),
}
EXAMPLES = """
Examples:
  nanollama train --config configs/curriculum.py:nano
  nanollama generate --checkpoint runs/curriculum_nano --prompt 'def area('
  nanollama export-gguf --checkpoint runs/curriculum_nano --type q8_0 --out nano.gguf

nanollama COMMAND --help shows the flags of a command, with examples.
"""


def main() -> None:
    """The entry point of the `nanollama` script."""
    from nanollama_jax.console import console

    name, *arguments = sys.argv[1:] or ["--help"]
    names = [name for group in GROUPS.values() for name in group]
    if name in ("-h", "--help"):
        console.print(overview())
    elif name in names:
        sys.path.append(os.getcwd())  # recipes import each other: `from configs import common`
        run(name, arguments)
    else:
        near = difflib.get_close_matches(name.replace("_", "-"), names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        _fail(f"command line: there is no command {name!r}{hint} (nanollama --help lists them)")


def run(name: str, arguments: list[str]) -> None:
    """Runs a command, as in `run("export-hf", ["--help"])`."""
    sys.argv = [f"nanollama {name}", *arguments]
    try:
        command = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command.main()
    except KeyboardInterrupt:  # imports can take seconds
        process.exit_interrupted()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "nanollama_jax":
            raise
        _fail(
            f"nanollama {name} needs {package}, which is not installed: "
            "pip install 'nanollama-jax[data,eval,export]' installs what all commands need"
        )


def overview() -> str:
    """The commands with the first line of their help, read without importing them."""
    lines = ["usage: nanollama COMMAND [flags]"]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        for name in names:
            path = pathlib.Path(__file__).with_name(f"{name.replace('-', '_')}.py")
            summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines.append(f"  {name:22} {summary.partition(chr(10))[0]}")
    return "\n".join([*lines, EXAMPLES.rstrip()])


def _fail(message: str) -> NoReturn:
    from nanollama_jax.console import error_console

    error_console.print(f"error: {message}")
    sys.exit(2)
