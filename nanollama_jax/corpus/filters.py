"""Filters that keep a part of a source's documents; `config.corpora.NAME.keep` names one."""

import re
from collections.abc import Callable

from nanollama_jax.errors import BadInput

STEM_CHARACTERS = 2000  # an article says at its beginning what it is about
STEM_TERMS = 4  # different ones

# Beginnings of words, and whole words ("gene" begins "general")
_BEGINNINGS = (
    "algebra algorithm antibod arithmetic asteroid astronom astrophys atom axiom bacteri "
    "biochem biolog botan catalys chemi chromosom combinator comput cosmolog crystal diffract "
    "ecolog eigenv electr engineer entrop enzym exponent fermi galax genetic genom geolog "
    "geometr gravit hydrogen immun isomer isotop kinetic logarithm magnet mathemati mechanic "
    "metaboli microb microscop mineral molecul morphism neural neuro nuclear nucle numeric "
    "optic orbit organism oscillat oxid oxygen paleont perturb photon physic physiol polymer "
    "polynom probabil program protein quant recurs relativ scien semiconduct software solven "
    "spectr statisti stochast symmetr tensor theor thermodynam topolog transistor vertebra "
    "wavelength zoolog"
).replace(" ", "|")
_WORDS = (
    "acid amino boolean carbon cell circuit compiler conjecture data derivative dimension "
    "dynamics element energy equation evolution finite fluid formula formulae fossil "
    "frequency function gene graph hypothesis inequality integer integral ion laser lemma "
    "linear logic logical manifold mass matrix matrices measure nitrogen node operator "
    "parameter particle planet plasma proof radiation reaction receptor scalar sequence set "
    "signal species star subset temperature turing variable vector velocity vertex vertices "
    "virus voltage wave"
).replace(" ", "|")
_STEM = re.compile(rf"\b(?:(?:{_BEGINNINGS})\w*|(?:{_WORDS})s?\b)", re.IGNORECASE)


def is_stem(text: str) -> bool:
    """Whether a text seems to be about science, technology, engineering or mathematics: it has 4
    different terms of these in its first 2,000 characters.

    In Wikipedia this keeps articles on such subjects and leaves out most articles on people, places
    and works. docs/data.md has figures for other text.
    """
    terms = set()
    for match in _STEM.finditer(text, 0, STEM_CHARACTERS):
        terms.add(match[0].lower()[:6])  # "electron" and "electric" count once
        if len(terms) == STEM_TERMS:
            return True
    return False


_FILTERS: dict[str, Callable[[str], bool]] = {"": lambda text: True, "stem": is_stem}


def filter_named(name: str) -> Callable[[str], bool]:
    """The filter of that name: whether to keep a text. "" keeps all.

    Raises `BadInput` for an unknown name.
    """
    if name not in _FILTERS:
        raise BadInput(
            f"keep={name!r} is not a filter: choose one of {', '.join(map(repr, _FILTERS))}"
        )
    return _FILTERS[name]
