"""What a setting may be: `setting`, `section` and `entries` declare one in a dataclass."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

MAX_STEPS = 2**24  # the schedules count steps in float32, which is exact up to here
NEVER = 10**9  # the longest interval: longer than any run
ROOT = pathlib.Path(__file__).parents[2]
SOURCE_FOLDERS = (".git", "benchmarks", "configs", "docs", "nanollama_jax", "tests", "tools")

_NAME = re.compile(r"(?![.-])[\w.+-]{1,100}")
_LINE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,4000}")
_TEXT = re.compile(r"[^\x00\ud800-\udfff]{0,100000}")


def unusable_folder(path: str | os.PathLike) -> str | None:
    """Why nothing may be written into a folder, or None."""
    where = pathlib.Path(os.path.realpath(path))
    if not os.fspath(path):
        return "the path is empty"
    if where == pathlib.Path(where.anchor):
        return "it is the root of the file system"
    if where == ROOT or any(where.is_relative_to(ROOT / folder) for folder in SOURCE_FOLDERS):
        return "it is this repository or one of its source folders"
    return None


@dataclasses.dataclass(frozen=True)
class Form:
    """What a string or a tuple must look like: in words, and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _is_gate(value: Any) -> bool:
    if not isinstance(value, tuple) or [type(x) in (int, float) for x in value] != [True] * 3:
        return False
    step, go, stop = value
    return type(step) is int and 1 <= step <= MAX_STEPS and 0 < go <= stop <= 1e12


def _is_output_folder(value: str) -> bool:
    return bool(_LINE.fullmatch(value)) and unusable_folder(value) is None


NAME = Form(
    "a plain name: at most 100 letters, digits, '_', '-', '+' and '.', "
    "not beginning with '.' or '-'",
    _is_name,
)
NAMES = Form("a tuple of names, such as ('docs', 'code')", lambda value: all(map(_is_name, value)))
SOME_NAMES = Form(
    "a tuple of at least one name, such as ('docs',)",
    lambda value: bool(value) and NAMES.accepts(value),
)
LINE = Form("one line of text", lambda value: bool(_LINE.fullmatch(value)))
PATH = Form("a path, on one line and not empty", lambda value: bool(value) and LINE.accepts(value))
URL = Form("a source's URL, on one line and not empty", PATH.accepts)
TEXT = Form("the text to train on: a path, a glob such as 'texts/**/*.txt', or a URL", PATH.accepts)
OUTPUT_FOLDER = Form(
    "a folder, on one line: not empty, not '/', not this repository or one of its source folders",
    _is_output_folder,
)
PROMPTS = Form(
    "a tuple of texts, none empty, such as ('What is 2 + 3?',)",
    lambda value: all(isinstance(x, str) and x.strip() and _TEXT.fullmatch(x) for x in value),
)
GATES = Form(
    f"a tuple of (step, go below, stop above): step a whole number from 1 to {MAX_STEPS:,}, then "
    "two perplexities above 0, the first not above the second",
    lambda value: all(map(_is_gate, value)),
)


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting. Numbers must be one of `choices` or inside the bounds (`ge` at least, `gt` above,
    `le` at most, `lt` below); strings and tuples must be one of `choices` or have the `form`."""

    default: Any  # its type, if every recipe, stage or corpus must state it
    meaning: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple = ()
    form: Form | None = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return isinstance(self.default, type)

    @property
    def type(self) -> type:
        """bool, int, float (which also accepts an int), str or tuple."""
        return self.default if self.required else type(self.default)

    @property
    def bounded(self) -> bool:
        return any(bound is not None for bound in (self.ge, self.gt, self.le, self.lt))

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, (int, float) if self.type is float else self.type):
            return False
        if self.type is not bool and isinstance(value, bool):
            return False
        if self.form:
            return self.form.accepts(value)
        if value in self.choices or self.type is bool:
            return True
        return (
            self.bounded
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def allowed(self) -> str:
        """The allowed values in words: "a number above 0 and at most 1"."""
        if self.form:
            return self.form.words
        if self.type is bool:
            return "True or False"
        options = [_shown(choice) for choice in self.choices]
        if self.bounded:
            bounds = (
                ("at least", self.ge),
                ("above", self.gt),
                ("at most", self.le),
                ("below", self.lt),
            )
            limits = " and ".join(f"{words} {_shown(x)}" for words, x in bounds if x is not None)
            if None not in (self.ge, self.le):
                limits = f"from {_shown(self.ge)} to {_shown(self.le)}"
            options.append(f"{'a whole number' if self.type is int else 'a number'} {limits}")
        return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else value or "''"


def setting(default: Any, meaning: str, **allowed: Any) -> Any:
    """A dataclass field that is a `Field`. `default`: a type, if there is none."""
    field = Field(default, meaning, **allowed)
    return dataclasses.field(
        default=dataclasses.MISSING if field.required else default, metadata={"field": field}
    )


def section(cls: type, each: bool = False) -> Any:
    """A dataclass field that holds another dataclass of settings; `each`: a dict of them."""
    return dataclasses.field(metadata={"section": cls, "each": each})


def entries(kind: type, meaning: str, **allowed: Any) -> Any:
    """A dataclass field that is a dict whose values are each a `Field` of type `kind`."""
    return dataclasses.field(metadata={"field": Field(kind, meaning, **allowed), "each": True})
