"""The settings of a recipe: their declarations as a table, and the check of a config against it.

nanollama_jax/recipes builds configs from `defaults`; `check` compares a config with `FIELDS` before
anything is allocated. Rules between settings (a batch that the devices cannot split) are in
nanollama_jax/train/settle.py, which resolves a config. Nothing here may import jax: recipes are
loaded before its environment is set.
"""

import dataclasses
import difflib
import os
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.config.fields import MAX_STEPS, NAME, NEVER, ROOT, Field, unusable_folder
from nanollama_jax.config.settings import OwnText, Resolved
from nanollama_jax.errors import BadInput

__all__ = [
    "FIELDS",
    "MAX_STEPS",
    "NEVER",
    "ROOT",
    "Field",
    "Resolved",
    "check",
    "check_workdir",
    "declared_name",
    "defaults",
    "did_you_mean",
    "leaves",
    "resolved",
    "unusable_folder",
]

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}" + (".*" if field.metadata.get("each") else "")
        if "section" in field.metadata:
            yield from _fields(field.metadata["section"], f"{name}.")
        else:
            yield name, field.metadata["field"]


# By dotted name; `*` stands for a corpus, a set of conversations or a benchmark.
FIELDS: dict[str, Field] = dict(_fields(Resolved))
OWN_FIELDS: dict[str, Field] = dict(_fields(OwnText))  # of configs/own.py
ALL_FIELDS = FIELDS | OWN_FIELDS
# What a recipe need not state: derived from other settings, and by configs/own.py from the text.
DERIVED = ("tokens_per_step",)
DERIVED_FROM_TEXT = (
    "end_step",
    "schedule.warmup_steps",
    "schedule.decay_start",
    "schedule.total_steps",
)


def defaults() -> ConfigDict:
    """A config of all settings that have a default."""
    nested: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if not field.required and "*" not in name:
            *sections, key = name.split(".")
            at = nested
            for section in sections:
                at = at.setdefault(section, {})
            at[key] = field.default
    return ConfigDict(nested)


def resolved(values: Mapping[str, Any], model: Any) -> Resolved:
    """The typed object of a stage's values, of which all must be there. `model`: a ModelConfig."""
    return dataclasses.replace(_build(Resolved, values), model=model)


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    found = {}
    for field in dataclasses.fields(cls):
        inner = field.metadata.get("section")
        default = None if inner else field.metadata["field"].default  # of a corpus, say
        value = values.get(field.name, default)
        if inner and field.metadata["each"]:
            value = {name: _build(inner, each) for name, each in value.items()}
        elif inner:
            value = _build(inner, value)
        found[field.name] = dict(value) if isinstance(value, Mapping) else value
    return cls(**found)


def check(config: ConfigDict) -> None:
    """Raises BadInput, one line that names every value that is not allowed, for the config of a
    stage or a curriculum."""
    everything = config.to_dict()
    stages = everything.pop("stages", None)
    shared = dict(leaves(everything))
    wrong = [_mistake("", path, value) for path, value in shared.items()]
    if "text" not in config:
        wrong += [f"{name} is for configs/own.py" for name in OWN_FIELDS if name in everything]
    optional = DERIVED + (DERIVED_FROM_TEXT if "text" in config else ())
    for stage, settings in (stages or {"": {}}).items():
        own, prefix = dict(leaves(settings)), f"stages.{stage}." if stages else ""
        present = {".".join(path) for path in (*shared, *own)}
        if stages and not NAME.accepts(stage):
            wrong.append(f"stages.{stage}: {stage!r} must be {NAME.words}")
        wrong += [_mistake(prefix, path, value) for path, value in own.items()]
        wrong += [
            f"{prefix}{name} is missing: it must be {field.allowed}"
            for name, field in FIELDS.items()
            if "*" not in name and name not in present and name not in optional
        ]
    if mistakes := list(filter(None, wrong)):
        raise BadInput("; ".join(mistakes))


def leaves(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """Each value, with the path of keys that leads to it."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def declared_name(path: tuple[str, ...]) -> str | None:
    """The setting's name in the table, such as "corpora.*.url" for ("corpora", "docs", "url"), or
    None if it is not declared."""
    if ".".join(path) in ALL_FIELDS:
        return ".".join(path)
    for name in (name for name in FIELDS if "*" in name):
        parts = name.split(".")
        if len(parts) == len(path) and all(map(lambda part, key: part in ("*", key), parts, path)):
            return name
    return None


def _mistake(prefix: str, path: tuple[str, ...], value: Any) -> str | None:
    """What is wrong with a setting's value, or None."""
    name = declared_name(path)
    shown = lambda: f"{prefix}{'.'.join(path)}={_brief.repr(value)}"  # noqa: E731
    if path[0] == "hooks" and len(path) > 2:  # hooks.NAME.SETTING: the hook checks its settings
        return None if NAME.accepts(path[1]) else f"{shown()}: {path[1]!r} must be {NAME.words}"
    if name is None:
        return f"{shown()}: there is no such setting{did_you_mean('.'.join(path))}"
    for part, key in zip(name.split("."), path, strict=True):
        if part == "*" and not NAME.accepts(key):
            return f"{shown()}: {key!r} must be {NAME.words}"
    field = ALL_FIELDS[name]
    return None if field.accepts(value) else f"{shown()}: must be {field.allowed}"


def did_you_mean(name: str) -> str:
    """ "; did you mean optimizer.peak_lr?", or "" if no setting has a similar name."""
    last = {known.rpartition(".")[2]: known for known in FIELDS if "*" not in known}
    near = difflib.get_close_matches(name, last.values(), n=1, cutoff=0.8)
    if not near:
        near = [
            last[found]
            for found in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
        ]
    return f"; did you mean {near[0]}?" if near else ""


def check_workdir(path: str | os.PathLike) -> None:
    """Raises BadInput for a workdir that must not be written to, or could not be read back."""
    if why := unusable_folder(path):
        raise BadInput(f"--workdir={os.fspath(path)}: {why}; choose a folder such as runs/NAME")
    if "[" in os.path.abspath(path):
        # Orbax globs for the parts of a checkpoint below this path, and would find none
        raise BadInput(
            f"--workdir={os.fspath(path)}: checkpoints cannot be kept in a folder with '[' in its "
            "path: rename it"
        )
