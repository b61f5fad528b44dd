"""A resolved config as the lines of --print_config."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.config import DERIVED, DERIVED_FROM_TEXT, leaves
from nanollama_jax.config.settings import Resolved


def lines(config: ConfigDict, stages: Mapping[str, Resolved]) -> Iterator[str]:
    """`section.key=value` of every setting, sorted, as the command line names it; what resolving
    changed is marked.

    Args:
      config: as the recipe and the command line have it.
      stages: name -> that stage's config, resolved; empty for text that is not prepared.
    """
    given = {".".join(path): value for path, value in leaves(config.to_dict())}
    if not stages:
        yield from (_line(name, given[name]) for name in _sorted(given))
        yield f"# derived from the text: {', '.join(DERIVED_FROM_TEXT)}"
        yield "# derived from the text where they are 0 or auto: the vocabulary, the tokenizer"
        return
    found = {
        stage: {".".join(path): value for path, value in leaves(config.to_dict())}
        for stage, config in stages.items()
    }
    shown: dict[str, str] = {}
    for name in {name for values in found.values() for name in values}:
        # A stage's own values by its name; the others' once, if they agree
        shared = {}
        for stage, values in found.items():
            if name not in values:
                continue
            of_stage = f"stages.{stage}.{name}"
            if of_stage in given:
                shown[of_stage] = _line(of_stage, values[name], given[of_stage])
            else:
                shared[stage] = values[name]
        if len(set(map(repr, shared.values()))) == 1:
            shown[name] = _line(name, next(iter(shared.values())), given.get(name))
        else:
            for stage, value in shared.items():
                of_stage = f"stages.{stage}.{name}"
                shown[of_stage] = _line(of_stage, value, None)
    yield from (shown[name] for name in _sorted(shown))


def _sorted(names: Mapping[str, Any]) -> list[str]:
    """By section; what is in none comes first, stages last."""
    return sorted(names, key=lambda name: (name.startswith("stages."), "." in name, name))


_SAME = object()


def _line(name: str, value: Any, given: Any = _SAME) -> str:
    is_derived = name.rpartition(".")[2] in DERIVED or (given is not _SAME and given != value)
    text = str(value)
    quoted = f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
    return f"{name}={quoted}" + ("  # derived" if is_derived else "")
