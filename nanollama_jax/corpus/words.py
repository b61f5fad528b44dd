"""Text as words: how benchmark items and documents are compared.

In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each
letter counts as part of a word, see `UNSPACED`.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

RULE = 2  # version of `normalise`: items that were saved under another rule match no document
# What share of a word a letter is, in scripts without spaces. Chosen, not measured: a shared run of
# 22 Chinese characters, or of 44 letters of the other scripts, is as long as one of 13 words, and
# longer than names of offices and laws. Vowel signs above and below do not count.
UNSPACED = {
    0.6: (  # Han
        (0x3005, 0x3007),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
    ),
    0.3: (
        (0x3041, 0x3096),  # kana
        (0x309D, 0x309F),
        (0x30A1, 0x30FA),
        (0x30FC, 0x30FF),
        (0x31F0, 0x31FF),
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Burmese
        (0x1780, 0x17FF),  # Khmer
        (0xAA60, 0xAA7F),  # Burmese
        (0xA9E0, 0xA9FF),
    ),
}

_ASCII_WORDS = bytes(
    byte if byte >= 128 or chr(byte).isalnum() else 32 for byte in range(256)
).lower()
# Soft hyphens, joiners and byte order marks are removed; ligatures are spelled out.
_WITHIN_WORDS = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff\ufb00-\ufb06]")
_ALONE = np.uint32(1 << 31)  # more than any code point
_RANGES = [(weight, *span) for weight, spans in UNSPACED.items() for span in spans]
_LETTERS = "".join(f"{chr(first)}-{chr(last)}" for _, first, last in _RANGES)
_WEIGHTS = {
    chr(point).encode(): weight
    for weight, first, last in _RANGES
    for point in range(first, last + 1)
}
# Runs between white space; a letter of `UNSPACED` is a run of its own.
PIECES = re.compile(rf"[{_LETTERS}]|[^\s{_LETTERS}]+")


def normalise(text: str) -> bytes:
    """The words of `text`, lower-case, in UTF-8, separated by spaces: runs of letters and digits.

    An apostrophe does not end a word ("don't": dont). A letter of `UNSPACED` is a word by itself.
    Combining signs that are separate characters (vowels in Hindi and Thai) are left out.
    """
    if not text.isascii():
        text = _WITHIN_WORDS.sub(_spelled_out, text)
        encoded = unicodedata.normalize("NFC", text).encode("utf-32-le", "surrogatepass")
        points = _other_words()[np.minimum(np.frombuffer(encoded, "<u4"), 0xFFFF)]
        if points.max(initial=0) >= _ALONE:
            alone = points >= _ALONE
            width = np.where(alone, 3, 1)
            last = np.cumsum(width)[alone] - 1
            points = np.repeat(points % _ALONE, width)
            points[last] = points[last - 2] = ord(" ")
        text = points.tobytes().decode("utf-32-le")
    return text.encode().translate(_ASCII_WORDS, b"'")


def count_words(words: Sequence[bytes]) -> float:
    """How many words these are; a letter of `UNSPACED` counts as part of one."""
    return round(sum(_WEIGHTS.get(word, 1.0) for word in words), 6)


def _spelled_out(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match[0]) if match[0] > "\ufaff" else ""


@functools.cache
def _other_words() -> np.ndarray:
    """Code point -> code point, up to 0xFFFF.

    Letters and digits become lower case and lose wide and other such forms; signs on letters become
    apostrophes, which `normalise` leaves out; everything else becomes a space. `_ALONE` is added to
    the letters of `UNSPACED`. On books with curly quotes, `normalise` takes 32 ns a character with
    this table, and 62 with NFKC, `lower` and a regular expression.
    """
    plain = [unicodedata.normalize("NFKC", chr(point)).lower() for point in range(0x10000)]
    words = [
        ord(to) if len(to) == 1 and to.isalnum() else point if chr(point).isalnum() else 32
        for point, to in enumerate(plain)
    ]
    signs = [
        unicodedata.category(to if len(to) == 1 else chr(point))[0] == "M"
        for point, to in enumerate(plain)
    ]
    left_out = [sign or chr(point) in "'\u2019" for point, sign in enumerate(signs)]
    table = np.where(left_out, ord("'"), np.array(words)).astype("<u4")
    ranges = [np.arange(first, last + 1) for first, last in itertools.chain(*UNSPACED.values())]
    table[np.isin(table, np.concatenate(ranges))] += _ALONE
    return table
