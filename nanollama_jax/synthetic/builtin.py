"""The built-in corpus: text that every installation already has, so that a first run needs no
download.

    docs       docstrings, one document per module; the packages' long descriptions; the topics of
               Python's language reference
    code       whole Python sources
    reasoning  reasoning-gym's generated questions with their answers

Sources come from the standard library and from packages that requirements.txt pins; they are read
as files and never imported. The documents and their order depend on the Python build (to the patch
version; a distribution may leave modules out) and on the pinned versions, which differ between
Python 3.11 and 3.12 for jax and flax. Other installed packages make no difference.
"""

import ast
import codecs
import functools
import hashlib
import importlib.metadata
import importlib.util
import locale
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from nanollama_jax.errors import BadInput

NAMES = ("docs", "code", "reasoning")

STANDARD_LIBRARY = "stdlib"
# Only what requirements.txt pins: the version of anything else would be the installer's choice.
DOCS_PACKAGES = (
    STANDARD_LIBRARY,
    "datasets",
    "flax",
    "grain",
    "jax",
    "matplotlib",
    "numpy",
    "optax",
    "orbax.checkpoint",
)
CODE_PACKAGES = (STANDARD_LIBRARY, "flax", "grain", "numpy", "optax", "orbax.checkpoint")
DESCRIBED = (
    "absl-py",
    "array-record",
    "datasets",
    "datatrove",
    "flax",
    "grain",
    "jax",
    "matplotlib",
    "ml-collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "reasoning-gym",
    "rich",
    "sentencepiece",
    "tensorflow-datasets",
    "wandb",
)
# Tests and vendored copies; `encodings` and jax's `export_back_compat_test_data` are generated tables.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "_vendor",
    "encodings",
    "pydoc_data",
    "internal_test_util",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "export_back_compat_test_data",
}
# What the build of this machine's Python or numpy wrote.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "__config__")
MIN_CHARACTERS = 200

# Item i is drawn from seed + i: far from the small seeds that SFT, DPO and evaluation use.
REASONING_SEED = 20_000_000
REASONING_ITEMS = 600
# Not every task is usable: list_functions draws from the global generator, and ransom_note depends on
# the order of a set; gsm_symbolic's templates are questions of GSM8K's test set
# (corpus/decontaminate.py finds them).
REASONING_TASKS = (
    "aiw",
    "base_conversion",
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "complex_arithmetic",
    "count_primes",
    "course_schedule",
    "decimal_arithmetic",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "largest_island",
    "lcm",
    "leg_counting",
    "letter_counting",
    "number_filtering",
    "number_format",
    "number_sorting",
    "shortest_path",
    "simple_geometry",
    "spell_backward",
    "syllogism",
    "time_intervals",
    "word_sorting",
)


def read(name: str, rank: int, world_size: int) -> Iterator[tuple[str, str]]:
    """Yields this rank's documents of `name` as (id, text). The ranks partition the documents."""
    if name not in NAMES:
        known = ", ".join(f"builtin://{name}" for name in NAMES)
        raise BadInput(f"builtin://{name} is not a built-in corpus: there are {known}")
    return {"docs": _docs, "code": _code, "reasoning": _reasoning}[name](rank, world_size)


def split_key(document_id: str) -> str | None:
    """The module that a document of docs or code belongs to; None for other documents.

    A module's docstrings are also in its code: both must fall on one side of the validation split.
    """
    kind, _, module = document_id.partition("/")
    return module if kind in ("docs", "code") else None


def _docs(rank: int, world_size: int) -> Iterator[tuple[str, str]]:
    for module, path in _modules(DOCS_PACKAGES)[rank::world_size]:
        text = _docstrings(module, path)
        if len(text) >= MIN_CHARACTERS:
            yield f"docs/{module}", text
    for distribution in DESCRIBED[rank::world_size]:
        yield f"description/{distribution}", _description(distribution)
    from pydoc_data.topics import topics  # plain data, half a megabyte

    for topic in sorted(topics)[rank::world_size]:
        yield f"topic/{topic}", topics[topic]


def _code(rank: int, world_size: int) -> Iterator[tuple[str, str]]:
    for module, path in _modules(CODE_PACKAGES)[rank::world_size]:
        with tokenize.open(path) as file:  # honours a PEP 263 encoding line
            text = file.read()
        if len(text) >= MIN_CHARACTERS:
            yield f"code/{module}", text


def _reasoning(rank: int, world_size: int) -> Iterator[tuple[str, str]]:
    import reasoning_gym

    encoding = locale.getpreferredencoding(False)  # reasoning_gym reads its texts in it
    if codecs.lookup(encoding).name != "utf-8":
        raise BadInput(
            f"builtin://reasoning needs UTF-8, and the locale's encoding is {encoding}: set "
            "PYTHONUTF8=1"
        )
    tasks = {
        task: reasoning_gym.create_dataset(task, seed=REASONING_SEED, size=REASONING_ITEMS)
        for task in REASONING_TASKS
    }
    for index in range(rank, REASONING_ITEMS, world_size):
        for task, items in tasks.items():  # any beginning has all tasks, for a tokenizer's sample
            yield (
                f"reasoning/{task}/{index}",
                f"Question: {items[index]['question'].strip()}\nAnswer: {items[index]['answer']}",
            )


@functools.cache  # walking the folders takes half a second
def _modules(packages: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(dotted name, file) of every module, without importing any.

    In the order of a hash of the names, so that any beginning is a fair sample (a tokenizer is
    trained on one) and ranks get similar shares.
    """
    found = []
    for package in packages:
        root = _root(package)
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            skipped = not SKIPPED_FOLDERS.isdisjoint(parts) or any(
                part.startswith(SKIPPED_PREFIXES) for part in parts
            )
            if not skipped and not path.stem.endswith("_test"):
                found.append(
                    (
                        ".".join(
                            parts if package == STANDARD_LIBRARY else (package, *parts)
                        ).removesuffix(".__init__"),
                        path,
                    )
                )
    return sorted(found, key=lambda module: (hashlib.blake2b(module[0].encode()).digest(), module))


def _root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # orbax.checkpoint, where orbax is not installed
        spec = None
    if spec is None:
        raise BadInput(
            f"the built-in corpus reads the package {package}, which is not installed: pip install "
            "-r requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _description(distribution: str) -> str:
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise BadInput(
            f"the built-in corpus describes {distribution}, which is not installed: pip install "
            "-r requirements.txt"
        ) from error
    description = metadata.get("Description") or metadata.get_payload() or ""
    return f"{metadata['Name']}: {metadata['Summary']}\n\n{description}"


def _docstrings(module: str, path: Path) -> str:
    """Every docstring of the module under its dotted name and signature, in source order.

    Repeated docstrings are left out.
    """
    with warnings.catch_warnings(action="ignore"):  # old sources have invalid escapes
        tree = ast.parse(path.read_bytes())
    sections: dict[str, str] = {}  # docstring -> heading

    def visit(node: ast.AST, name: str) -> None:
        docstring = ast.get_docstring(node)
        if docstring:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            sections.setdefault(
                docstring, f"{name}({ast.unparse(node.args)})" if is_function else name
            )
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n\n".join(f"{heading}\n\n{docstring}" for docstring, heading in sections.items())
