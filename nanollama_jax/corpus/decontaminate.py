"""Finds benchmark items inside documents, so that they are not trained on: shared word 13-grams, as in GPT-3 (Brown et al. 2020, appendix C).

Text is compared as lower-case words without punctuation. A passage of 13 words or more is found by any 13 of them in a row;
a question of 8 to 12 words only as a whole; shorter ones are not looked for, and counted. In scripts that put no spaces between
words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter is a part of a word, `UNSPACED`: 22 Chinese characters count as
13 words. What is shared must be most of the passage, or have 3 bytes a word, or 120: else any two loops over `dp[i][j]` agree.
What a document holds is hashed in numpy and looked up in a table of all items; the few candidates are compared word by word, so
no hit is a hash collision. MinHash cannot do this: an item of 50 words hardly changes the Jaccard similarity of a document of
1,000 (docs/data.md has the figures).
"""

import dataclasses
import functools
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanollama_jax.corpus.sources import Document, batched, read_records
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json

GRAM_WORDS = 13
MIN_WORDS = 8  # of a question that is looked for as a whole
MARGIN = 200  # characters removed on each side of a hit by the policy "cut", and the least that is kept between two cuts
WORD_BYTES, ENOUGH_BYTES, MOST = 3, 120, 0.8
POLICIES = ("drop", "cut")
RULE = 2  # of `normalise`: items that were saved by another rule are found in no document
# How much of a word a letter is, in scripts without spaces. Chosen, not measured: a shared run of 22 Chinese characters, or of 44
# letters of the others, is as long as one of 13 words, longer than names of offices and laws. Vowel signs above and below do not count.
UNSPACED = {
    0.6: ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),  # Han
    0.3: (
        *(
            (0x3041, 0x3096),
            (0x309D, 0x309F),
            (0x30A1, 0x30FA),
            (0x30FC, 0x30FF),
            (0x31F0, 0x31FF),
        ),  # kana
        *(
            (0x0E00, 0x0EFF),
            (0x1000, 0x109F),
            (0x1780, 0x17FF),
            (0xAA60, 0xAA7F),
            (0xA9E0, 0xA9FF),
        ),  # Thai, Lao; Burmese; Khmer; Burmese
    ),
}

_ASCII_WORDS = bytes(
    byte if byte >= 128 or chr(byte).isalnum() else 32 for byte in range(256)
).lower()
# Soft hyphens, joiners and byte order marks go; ligatures are spelt out
_WITHIN_WORDS = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff\ufb00-\ufb06]")
_CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's answers: "2 * 3 = <<2*3=6>>6"
_MARKUP = re.compile(r"\[\w+\]")  # HellaSwag's "[header]", "[step]"
_BATCH_BYTES = (
    2**17
)  # hashed at once: arrays that stay in the cache (64K to 256K: 150 MB/s of hashing alone, 1M: 97)


def normalise(text: str) -> bytes:
    """The words of `text`, lower-case, in UTF-8, with spaces between: runs of letters and digits; an apostrophe is no break ("don't": dont).
    A letter of `UNSPACED` is a word of its own. Signs on letters that are characters of their own (vowels in Hindi and Thai) are left out."""
    if not text.isascii():
        text = _WITHIN_WORDS.sub(
            lambda match: unicodedata.normalize("NFKC", match[0]) if match[0] > "\ufaff" else "",
            text,
        )
        points = np.frombuffer(
            unicodedata.normalize("NFC", text).encode("utf-32-le", "surrogatepass"), "<u4"
        )
        points = _other_words()[np.minimum(points, 0xFFFF)]
        if points.max(initial=0) >= _ALONE:
            alone = points >= _ALONE
            width = np.where(alone, 3, 1)
            last = np.cumsum(width)[alone] - 1
            points = np.repeat(points % _ALONE, width)
            points[last] = points[last - 2] = ord(" ")
        text = points.tobytes().decode("utf-32-le")
    return text.encode().translate(_ASCII_WORDS, b"'")


@functools.cache
def _other_words() -> np.ndarray:
    """Code point -> code point up to 0xFFFF: letters and digits in lower case, wide and other such forms as plain ones; signs on letters become
    apostrophes, which are left out; all else is a space. `_ALONE` is added to the letters of `UNSPACED`.

    On books with curly quotes all of `normalise` takes 32 ns a character with this table; with NFKC, `lower` and a regular expression, 62.
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
    unspaced = np.concatenate(
        [np.arange(first, last + 1) for first, last in itertools.chain(*UNSPACED.values())]
    )
    letters = np.isin(table, unspaced)
    table[letters] += _ALONE
    return table


_ALONE = np.uint32(1 << 31)  # more than any code point
_LETTERS = "".join(
    f"{chr(first)}-{chr(last)}" for first, last in itertools.chain(*UNSPACED.values())
)
_PIECES = re.compile(rf"[{_LETTERS}]|[^\s{_LETTERS}]+")
_WEIGHTS = {
    chr(point).encode(): weight
    for weight, ranges in UNSPACED.items()
    for first, last in ranges
    for point in range(first, last + 1)
}


def _weight(words: Sequence[bytes]) -> float:
    """How many words they are, letters of `UNSPACED` being parts of one."""
    return round(sum(_WEIGHTS.get(word, 1.0) for word in words), 6)


@dataclasses.dataclass(frozen=True)
class Item:
    """One record of a benchmark, its texts normalised. `where` names its file and line."""

    benchmark: str
    where: str
    questions: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hit:
    """`start` and `end` are characters of the document, at most a word off; `text` is what stands there."""

    benchmark: str
    item: str
    start: int
    end: int
    text: str


# The fields of each benchmark in its hub's schema: questions, and answers that would give them away. A name as bfcl_simple has the schema bfcl.
_PASSAGES: dict[str, Callable[[dict], tuple[list[str], list[str]]]] = {
    "mmlu": lambda r: ([r["question"]], r["choices"]),
    "gsm8k": lambda r: ([r["question"]], [r["answer"], _CALCULATOR.sub("", r["answer"])]),
    "hellaswag": lambda r: (
        [
            _MARKUP.sub(
                " ",
                f"{r['ctx']} {r['endings'][int(r['label'])]}"
                if str(r["label"]).isdigit()
                else r["ctx"],
            )
        ],
        [],
    ),
    "arc": lambda r: ([r["question"]], r["choices"]["text"]),
    "truthfulqa": lambda r: (
        [r["question"]],
        r["mc1_targets"]["choices"] + r["mc2_targets"]["choices"],
    ),
    "mt_bench": lambda r: (r["turns"] if "turns" in r else r["prompt"], []),
    "bfcl": lambda r: ([message["content"] for turn in r["question"] for message in turn], []),
    "text": lambda r: ([r["text"]], []),
}


@functools.lru_cache(maxsize=1)
def _read_benchmarks(urls: tuple[tuple[str, str], ...]) -> list[Item]:
    items = []
    for name, url in urls:
        schema = next((schema for schema in _PASSAGES if f"{name}_".startswith(f"{schema}_")), None)
        if schema is None:
            raise BadInput(
                f"benchmark {name!r} is of no known schema: begin its name with one of {', '.join(_PASSAGES)}"
            )
        before = len(items)
        for where, record in read_records(url):
            try:
                questions, answers = _PASSAGES[schema](record)
                if isinstance(questions, str) or isinstance(answers, str):
                    raise TypeError("a text where there should be a list")
                item = Item(name, where, tuple(map(_words, questions)), tuple(map(_words, answers)))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise BadInput(
                    f"{where}: not a record of {schema} ({type(error).__name__}: {error}): check the URL of benchmark {name!r}"
                ) from error
            items.append(item)
        if len(items) == before:
            raise BadInput(f"benchmark {name!r} has no items: {url} is empty")
    return items


def _words(text: str) -> str:
    return b" ".join(normalise(text).split()).decode()


def read_benchmarks(urls: Mapping[str, str]) -> list[Item]:
    """The items of all benchmarks, name -> source URL (corpus/sources.py). Raises `BadInput` that names what cannot be read."""
    return _read_benchmarks(tuple(urls.items()))


class Index:
    """All passages of all items, to be found in documents."""

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.too_short: Counter[str] = Counter()  # questions, of each benchmark
        self._passages: list[tuple[int, bytes, float]] = []  # (item, words, how many they are)
        texts: dict[bool, list[tuple[int, bytes]]] = {False: [], True: []}
        for number, item in enumerate(items):
            for passage in (*item.questions, *item.answers):
                words = passage.encode().split()
                weight = _weight(words)
                if weight >= GRAM_WORDS or (weight >= MIN_WORDS and passage in item.questions):
                    texts[len(words) >= GRAM_WORDS].append((len(self._passages), passage.encode()))
                    self._passages.append((number, passage.encode(), weight))
                else:
                    self.too_short[item.benchmark] += passage in item.questions
        self._short = self._table(
            (hashes[:1] for hashes in (_grams(text)[1] for _, text in texts[False])), texts[False]
        )
        self._long = self._table((_grams(text)[2] for _, text in texts[True]), texts[True])

    @staticmethod
    def _table(
        hashes: Iterable[np.ndarray], texts: list[tuple[int, bytes]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.uint64]:
        """Sorted hashes, the passage of each, and a table by their leading bits, sparse enough to turn down almost all that is not here."""
        hashes = list(hashes)
        passages = np.repeat(
            np.array([passage for passage, _ in texts], np.int32), [len(some) for some in hashes]
        )
        keys = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        bits = max(16, (16 * len(keys)).bit_length())
        shift = np.uint64(64 - bits)
        present = np.zeros(2**bits, bool)
        present[keys >> shift] = True
        return keys[order], passages[order], present, shift

    def find(self, texts: Sequence[str]) -> list[list[Hit]]:
        """What of the items is in each text, in the order of the text."""
        found: list[list[Hit]] = [[] for _ in texts]
        batch, size = [], 0
        for number, text in enumerate(texts):
            batch.append((number, normalise(text)))
            size += len(batch[-1][1])
            if size >= _BATCH_BYTES or number == len(texts) - 1:
                for inside, spans in self._spans([words for _, words in batch]).items():
                    found[batch[inside][0]] = self._hits(
                        texts[batch[inside][0]], batch[inside][1].split(), spans
                    )
                batch, size = [], 0
        return found

    def _spans(self, documents: list[bytes]) -> dict[int, dict[int, list[tuple[int, int]]]]:
        """document -> passage -> its (first word, one past the last), overlaps merged."""
        words_at, eights, thirteens = _grams(b" ".join(documents))
        first_bytes = np.cumsum([0] + [len(document) + 1 for document in documents[:-1]])
        first_words = np.searchsorted(words_at, first_bytes)
        spans: dict[int, dict[int, list[tuple[int, int]]]] = {}
        words_of = functools.cache(lambda document: documents[document].split())
        for grams, (keys, passages, present, shift) in (
            (eights, self._short),
            (thirteens, self._long),
        ):
            maybe = np.flatnonzero(present[grams >> shift])
            first, last = (np.searchsorted(keys, grams[maybe], side) for side in ("left", "right"))
            for at, candidates in [
                (int(maybe[i]), passages[first[i] : last[i]].tolist())
                for i in np.flatnonzero(first < last)
            ]:
                document = int(np.searchsorted(first_words, at, side="right")) - 1
                start = at - int(first_words[document])
                words = words_of(document)
                for candidate in candidates:
                    passage = self._passages[candidate][1]
                    length = min(passage.count(b" ") + 1, GRAM_WORDS)
                    shared = b" ".join(words[start : start + length])
                    if shared.count(b" ") == length - 1 and b" %b " % shared in b" %b " % passage:
                        of_passage = spans.setdefault(document, {}).setdefault(candidate, [])
                        if of_passage and start < of_passage[-1][1]:
                            of_passage[-1] = (
                                of_passage[-1][0],
                                max(of_passage[-1][1], start + length),
                            )
                        else:
                            of_passage.append((start, start + length))
        return spans

    def _hits(
        self, text: str, words: list[bytes], spans: dict[int, list[tuple[int, int]]]
    ) -> list[Hit]:
        """Words as characters: they are counted in each of the pieces between white space, a letter of `UNSPACED` being one."""
        pieces = [(match.start(), match.end()) for match in _PIECES.finditer(text)]
        words_before = np.cumsum(
            [0] + [len(normalise(text[start:end]).split()) for start, end in pieces]
        )
        hits = set()
        for passage, of_passage in spans.items():
            number, sought, weight = self._passages[passage]
            item, length = self.items[number], sought.count(b" ") + 1
            for first, end in of_passage:
                if weight < GRAM_WORDS and end - first < length:  # a short one only as a whole
                    continue
                if _weight(words[first:end]) < min(GRAM_WORDS, weight):
                    continue
                if end - first >= MOST * length or len(b"".join(words[first:end])) >= min(
                    WORD_BYTES * (end - first), ENOUGH_BYTES
                ):
                    start = pieces[
                        min(
                            int(np.searchsorted(words_before, first, side="right")) - 1,
                            len(pieces) - 1,
                        )
                    ][0]
                    stop = pieces[
                        min(max(int(np.searchsorted(words_before, end)) - 1, 0), len(pieces) - 1)
                    ][1]
                    hits.add(Hit(item.benchmark, item.where, start, stop, text[start:stop]))
        return sorted(hits, key=lambda hit: (hit.start, hit.end, hit.item))


def _grams(words: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each word starts, and hashes of the 8 and of the 13 words from each on (uint64; the last words begin none).

    A word's hash is made of its first and last eight bytes and its length: all of it for most words, and enough to find candidates.
    """
    text = np.frombuffer(b"%b%b%b" % (b" " * 8, words, b" " * 8), np.uint8)
    edges = np.flatnonzero(np.diff(text == 32))
    starts, ends = edges[::2] + 1, edges[1::2] + 1
    eight_bytes = np.ndarray(len(text) - 7, "<u8", text.data, strides=(1,))
    lengths = ends - starts
    first = eight_bytes[starts] & _MASKS[np.minimum(lengths, 8)]
    hashes = (
        (first ^ (first >> np.uint64(29))) * _FACTOR
        + eight_bytes[ends - 8] * (lengths > 8)
        + lengths.astype(np.uint64)
    )
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _FACTOR
    hashes ^= hashes >> np.uint64(31)
    if len(hashes) < GRAM_WORDS:
        hashes = np.concatenate([hashes, np.zeros(GRAM_WORDS - len(hashes), np.uint64)])
    two = hashes[:-1] * _FACTOR + hashes[1:]
    four = two[:-2] * _FACTOR_2 + two[2:]
    eight = four[:-4] * _FACTOR_4 + four[4:]
    twelve = eight[:-4] * _FACTOR_4 + four[8:]
    return starts - 8, eight, twelve[:-1] * _FACTOR + hashes[12:]


_MASKS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)
_FACTOR, _FACTOR_2, _FACTOR_4 = (
    np.uint64(pow(0x9E3779B97F4A7C15, power, 2**64)) for power in (1, 2, 4)
)


def clean(
    documents: Sequence[Document], index: Index, policy: str
) -> tuple[list[Document], list[dict[str, Any]], dict[str, int]]:
    """The documents without what is contaminated; what was found; and how many documents were dropped or cut, and characters removed.

    "drop" leaves contaminated documents out; "cut" removes each hit with 200 characters on either side: what is left falls into documents of
    their own, `ID#0`, `ID#1`, ... , which stay on one side of the validation split.
    """
    kept, report, counts = (
        [],
        [],
        {"documents_dropped": 0, "documents_cut": 0, "characters_removed": 0},
    )
    for document, hits in zip(documents, index.find([document.text for document in documents])):
        report += [{"document": document.id, **dataclasses.asdict(hit)} for hit in hits]
        parts = _uncut(document, hits) if hits and policy == "cut" else []
        if hits:
            counts["documents_cut" if parts else "documents_dropped"] += 1
            counts["characters_removed"] += len(document.text) - sum(
                len(part.text) for part in parts
            )
        kept += parts if hits else [document]
    return kept, report, counts


def _uncut(document: Document, hits: Sequence[Hit]) -> list[Document]:
    split_key = document.split_key or document.text
    parts, at = [], 0
    for start, end in [(hit.start - MARGIN, hit.end + MARGIN) for hit in hits] + [
        (len(document.text), len(document.text))
    ]:
        if start - at >= MARGIN:
            parts.append(
                Document(
                    text=document.text[at:start],
                    id=f"{document.id}#{len(parts)}",
                    split_key=split_key,
                )
            )
        at = max(at, end)
    return parts


def search(
    documents: Iterable[Document], index: Index, on_progress: Callable[[int, int, int], None]
) -> dict[str, Any]:
    """What of the benchmarks is in `documents`; `on_progress` hears how many documents, bytes and hits there are so far."""
    hits, count, size = [], 0, 0
    for batch in batched(documents):
        hits += clean(batch, index, "drop")[1]
        count, size = (
            count + len(batch),
            size + sum(len(document.text.encode()) for document in batch),
        )
        on_progress(count, size, len(hits))
    return {
        "documents": count,
        "bytes": size,
        "benchmarks": summary(index, hits),
        "contaminated": hits,
    }


def too_short(counts: Mapping[str, int]) -> list[str]:
    """A line on the questions that were not looked for, `Index.too_short`, where there are any."""
    named = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return (
        [f"{sum(counts.values()):,} questions of the benchmarks are too short to look for: {named}"]
        if named
        else []
    )


def save_items(items: Sequence[Item], path: Path) -> None:
    """Writes the items for `load_index`."""
    write_json(path, [dataclasses.astuple(item) for item in items])


def load_index(path: Path) -> Index:
    """The index of a file that `save_items` wrote."""
    return _index(path.read_bytes())


@functools.lru_cache(maxsize=1)  # building it takes a few seconds for the full benchmarks
def _index(items: bytes) -> Index:
    return Index([Item(*fields) for fields in json.loads(items)])


def with_url(benchmarks: Mapping[str, str] | None) -> dict[str, str]:
    """The benchmarks to look for: those that have a URL."""
    return {name: url for name, url in (benchmarks or {}).items() if url}


def summary(index: Index, report: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """benchmark -> how many items it has, how many of them were found, in how many documents, and questions too short to look for."""
    benchmarks = {
        item.benchmark: {"items": 0, "items_found": set(), "documents": set()}
        for item in index.items
    }
    for item in index.items:
        benchmarks[item.benchmark]["items"] += 1
    for hit in report:
        benchmarks[hit["benchmark"]]["items_found"].add(hit["item"])
        benchmarks[hit["benchmark"]]["documents"].add(hit["document"])
    return {
        name: {key: value if key == "items" else len(value) for key, value in counts.items()}
        | {"too_short": index.too_short[name]}
        for name, counts in benchmarks.items()
    }
