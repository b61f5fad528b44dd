"""Runs the commands of the package in this checkout, whether it is installed or not.

The only place that changes `sys.path`: Python puts the folder of a script on it, tools/, and not
the repository.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


def run(name: str) -> None:
    from nanollama_jax import commands

    commands.run(name, sys.argv[1:])
