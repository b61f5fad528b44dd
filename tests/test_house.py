"""The floors of the house: which room may import which, how long a function may be, and what
training does not load. Imports are read, not run, so that a late import inside a function counts.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "nanollama_jax"

# Every room, from the ground up, and the rooms it may import. Each may import only rooms above it
# in this table, so nothing runs back up. A part of a room that stands lower has its own line.
GROUND = "console errors files process"
FLOORS = {
    "process": "",
    "settings": "",
    "console": "process",
    "errors": "console process",
    "files": "console errors process",
    "distributed": GROUND,
    "sharding": "errors",
    "tokenizer": "errors files",
    "model": "errors sharding",
    "data": f"{GROUND} tokenizer",
    "chat": f"{GROUND} tokenizer",
    "synthetic": f"{GROUND} tokenizer data.shards data.records chat",
    "corpus": f"{GROUND} tokenizer data chat synthetic",
    "planning.memory": "errors model sharding",
    "config": f"{GROUND} sharding tokenizer model planning.memory",
    "recipes": f"{GROUND} config",
    "checkpoint": f"{GROUND} distributed config model tokenizer sharding data",
    "infer": f"{GROUND} model tokenizer sharding chat checkpoint",
    "export": f"{GROUND} model tokenizer sharding chat checkpoint",
    "evals": f"{GROUND} model tokenizer sharding data chat synthetic checkpoint infer",
    "train": f"{GROUND} distributed settings config model tokenizer sharding data chat checkpoint "
    "planning.memory infer export evals",
    "planning": f"{GROUND} settings config model tokenizer sharding data checkpoint train",
    "curriculum": f"{GROUND} distributed config model tokenizer sharding data corpus checkpoint "
    "train",
    "own": f"{GROUND} config recipes tokenizer data corpus checkpoint train curriculum",
    "serve": f"{GROUND} settings model tokenizer sharding chat checkpoint infer",
}
# The doors: what a user calls may call everything.
DOORS = {"__init__", "__main__", "command_line", "commands"}

# What a part of a room may not import, though its room may.
FORBIDDEN = {
    "train/loop.py": {"infer", "export", "evals", "chat", "corpus", "synthetic"},
    "train/step.py": {"infer", "export", "evals", "data", "checkpoint"},
}

LONGEST_FUNCTION = 80
LONGER: dict[str, str] = {}  # "file.py:function" -> why it is longer


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(path inside the package, syntax tree) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def imports(path: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` gives a.b."""
    inside = ["nanollama_jax", *Path(path).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(parts: list[str]) -> str:
    """The line of FLOORS for a module's path inside the package."""
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else parts[0]


def misplaced(room: str, path: str, tree: ast.AST) -> set[str]:
    """Names inside the package that a module of this room may not import."""
    allowed = {room, *FLOORS[room].split()}
    found = set()
    for name in imports(path, tree):
        parts = name.split(".")[1:]
        if not name.startswith("nanollama_jax.") or ".".join(parts[:2]) in allowed:
            continue
        if parts[0] in FORBIDDEN.get(path, ()) or parts[0] not in allowed:
            found.add(name)
    return found


def test_the_table_has_no_way_back_up():
    seen: set[str] = set()
    for room, allowed in FLOORS.items():
        rooms = {other.split(".")[0] if other not in FLOORS else other for other in allowed.split()}
        assert rooms <= seen, f"{room} may import {', '.join(sorted(rooms - seen))}, further down"
        seen.add(room)
    assert not FORBIDDEN.keys() - {path for path, _ in modules()}


def test_every_room_has_its_line():
    rooms = {path.stem for path in PACKAGE.glob("*.py")}
    rooms |= {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    unknown = rooms - DOORS - FLOORS.keys()
    assert not unknown, f"say in FLOORS what {', '.join(sorted(unknown))} may import"


@pytest.mark.parametrize("room", [pytest.param(room, id=room) for room in FLOORS])
def test_a_room_imports_only_what_stands_below_it(room):
    wrong = {
        path: names
        for path, tree in modules()
        if room_of(list(Path(path).with_suffix("").parts)) == room
        and (names := misplaced(room, path, tree))
    }
    assert not wrong, "\n".join(
        f"nanollama_jax/{path} imports {', '.join(sorted(names))}" for path, names in wrong.items()
    )


def test_no_room_imports_the_doors_and_no_tool_another():
    for path, tree in modules():
        if path.split("/")[0].removesuffix(".py") in DOORS:
            continue
        named = {name.split(".")[1] for name in imports(path, tree) if name.count(".")}
        assert not named & (DOORS - {"__init__"}), path
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"checkout"}
    for path in (ROOT / "tools").glob("*.py"):
        names = {name.split(".")[0] for name in imports("x.py", ast.parse(path.read_text()))}
        names |= {
            name.removeprefix("tools.").split(".")[0]
            for name in imports("x.py", ast.parse(path.read_text()))
            if name.startswith("tools.")
        }
        assert not names & (tools - {path.stem}), f"{path} imports another tool"


@pytest.mark.parametrize("limit", [pytest.param(LONGEST_FUNCTION, id="length")])
def test_no_function_is_longer_than_the_limit(limit):
    long = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= limit
    }
    assert long.keys() == LONGER.keys(), f"over {limit} lines: {long}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param(
            "nanollama_jax.train.loop",
            "nanollama_jax.corpus nanollama_jax.synthetic datatrove ray transformers torch wandb",
            id="loop loads",
        ),
        pytest.param(
            "nanollama_jax.data.pipeline",
            "nanollama_jax.corpus nanollama_jax.train.loop nanollama_jax.model datatrove ray",
            id="pipeline loads",
        ),
        pytest.param("nanollama_jax", "jax flax nanollama_jax.train.loop", id="package loads"),
    ],
)
def test_what_an_import_does_not_load(module, absent):
    program = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    found = {
        name
        for name in loaded
        if any(name == each or name.startswith(f"{each}.") for each in absent.split())
    }
    assert not found, f"import {module} loads {', '.join(sorted(found)[:5])}"


def test_data_does_not_import_jax_at_the_top():
    """Its workers must not open the GPU."""
    for path, tree in modules():
        if path.startswith("data/"):
            top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = imports(path, ast.Module(top, []))
            assert not any(name.split(".")[0] == "jax" for name in names), path
