"""Texts on which tokenizers disagree: spaces everywhere, other alphabets, bytes without a piece,
text that looks like special tokens.
"""

# ruff: noqa: RUF001  letters that look like others are the point
import numpy as np

_PARTS = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n",
    "\u00a0",
    "\u3000",
    "\u2581",
    "\u200b",
    "\ufeff",
    "\x00",
    "\x7f",
    "\ufffd",
    "a",
    "The",
    "the",
    "def f(x):",
    "self",
    "hello",
    "I'm",
    "don't",
    "ﬁ",
    "½",
    "É",
    "e\u0301",
    "ß",
    "İ",
    "ı",
    "naïve",
    "co-op",
    "…",
    "—",
    "“”",
    "0",
    "1234567890",
    "3.14",
    "-1e-9",
    "1,000",
    "٣",
    "²",
    "日本語",
    "中文字符",
    "한국어",
    "ไทย",
    "हिन्दी",
    "العربية",
    "עברית",
    "Ελλάδα",
    "Привет",
    "😀",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "🏳️‍🌈",
    "\U0001f9ff",
    "\U00010348",
    "𝔘𝔫𝔦",
    "\ue000",
    "\U000e0041",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_call|>",
    "<0x0A>",
    "<0xFF>",
    "[INST]",
    "<|endoftext|>",
    "< s>",
    "<s",
    "s>",
    "{",
    "}",
    '"',
    "\\",
    "\\n",
    "%s",
    "$x$",
    "http://a.b/c?d=e",
    "<html>",
    "&amp;",
    "#!",
    "/* */",
    "`",
    "~~~",
    "()[]{}<>",
    "==",
    "!=",
    "->",
]


def awkward_strings(count: int = 3200) -> list[str]:
    """Each part alone, with whitespace around it, and random concatenations; all different."""
    rng = np.random.default_rng(0)
    found = dict.fromkeys(
        [
            "",
            *_PARTS,
            *(
                before + part + after
                for part in _PARTS
                for before in ("", " ", "\n", "  ")
                for after in ("", " ", "\t")
            ),
        ]
    )
    while len(found) < count:
        found["".join(rng.choice(_PARTS, rng.integers(2, 12)).tolist())] = None
    return list(found)
