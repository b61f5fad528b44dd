"""Finds benchmark items inside documents, so that they are not trained on.

The method is that of GPT-3 (Brown et al. 2020, appendix C): shared word 13-grams. Text is compared
as lower-case words without punctuation (corpus/words.py). A passage of 13 words or more is found by
any 13 of them in a row; a question of 8 to 12 words only as a whole; shorter questions are counted
and not looked for. In scripts without spaces, 22 Chinese characters count as 13 words. What is
shared must be most of the passage, or have 3 bytes a word, or 120 bytes: otherwise any two loops
over `dp[i][j]` match.

Documents are hashed in numpy and looked up in a table of all items. The few candidates are compared
word by word, so that no hit is a hash collision. MinHash cannot do this: an item of 50 words hardly
changes the Jaccard similarity of a document of 1,000 (docs/data.md has the figures).
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanollama_jax.corpus.sources import Document, batched, read_records
from nanollama_jax.corpus.words import PIECES, count_words, normalise
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json

GRAM_WORDS = 13
MIN_WORDS = 8  # of a question that is looked for as a whole
# Characters that "cut" removes on each side of a hit, and the least it keeps between two hits.
MARGIN = 200
WORD_BYTES, ENOUGH_BYTES, MOST = 3, 120, 0.8
POLICIES = ("drop", "cut")
_CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's answers: "2 * 3 = <<2*3=6>>6"
_MARKUP = re.compile(r"\[\w+\]")  # HellaSwag's "[header]", "[step]"
# Hashed at once, so that arrays stay in the cache: 150 MB/s for 64K to 256K, 97 MB/s for 1M.
_BATCH_BYTES = 2**17


@dataclasses.dataclass(frozen=True)
class Item:
    """One record of a benchmark, its texts normalised."""

    benchmark: str
    where: str  # file:line
    questions: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hit:
    """A passage of an item in a document."""

    benchmark: str
    item: str  # `where` of the item
    start: int  # in characters of the document, at most a word off
    end: int
    text: str  # the document's characters from `start` to `end`


def _hellaswag(record: dict) -> tuple[list[str], list[str]]:
    text = record["ctx"]
    if str(record["label"]).isdigit():
        text = f"{text} {record['endings'][int(record['label'])]}"
    return [_MARKUP.sub(" ", text)], []


# The questions of a record in each benchmark's schema on the hub, and answers that would give them
# away. The schema is the beginning of the benchmark's name: bfcl_simple has the schema bfcl.
_PASSAGES: dict[str, Callable[[dict], tuple[list[str], list[str]]]] = {
    "mmlu": lambda r: ([r["question"]], r["choices"]),
    "gsm8k": lambda r: ([r["question"]], [r["answer"], _CALCULATOR.sub("", r["answer"])]),
    "hellaswag": _hellaswag,
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
                f"benchmark {name!r} has no known schema: begin its name with one of "
                f"{', '.join(_PASSAGES)}"
            )
        before = len(items)
        for where, record in read_records(url):
            try:
                questions, answers = _PASSAGES[schema](record)
                if isinstance(questions, str) or isinstance(answers, str):
                    raise TypeError("a text instead of a list")
                item = Item(name, where, tuple(map(_words, questions)), tuple(map(_words, answers)))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise BadInput(
                    f"{where}: not a record of {schema} ({type(error).__name__}: {error}): check "
                    f"the URL of benchmark {name!r}"
                ) from error
            items.append(item)
        if len(items) == before:
            raise BadInput(f"benchmark {name!r} has no items: {url} is empty")
    return items


def _words(text: str) -> str:
    return b" ".join(normalise(text).split()).decode()


def read_benchmarks(urls: Mapping[str, str]) -> list[Item]:
    """The items of all benchmarks, name -> source URL (corpus/sources.py).

    Raises `BadInput` that names what cannot be read.
    """
    return _read_benchmarks(tuple(urls.items()))


class Index:
    """Finds the passages of all items in documents."""

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.too_short: Counter[str] = Counter()  # benchmark -> questions that are not looked for
        self._passages: list[tuple[int, bytes, float]] = []  # (item, words, number of words)
        texts: dict[bool, list[tuple[int, bytes]]] = {False: [], True: []}
        for number, item in enumerate(items):
            for passage in (*item.questions, *item.answers):
                words = passage.encode().split()
                count = count_words(words)
                if count >= GRAM_WORDS or (count >= MIN_WORDS and passage in item.questions):
                    texts[len(words) >= GRAM_WORDS].append((len(self._passages), passage.encode()))
                    self._passages.append((number, passage.encode(), count))
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
        """Sorted hashes, the passage of each, and a table of their leading bits (with the shift
        that gives these), sparse enough to reject almost every hash that is not in it."""
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
        """The hits in each text, in the order of the text."""
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
        """document -> passage -> the spans of words that it shares, overlaps merged."""
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
        """Maps spans of words back to characters by counting the words in each of `PIECES`."""
        pieces = [(match.start(), match.end()) for match in PIECES.finditer(text)]
        words_before = np.cumsum(
            [0] + [len(normalise(text[start:end]).split()) for start, end in pieces]
        )
        hits = set()
        for passage, of_passage in spans.items():
            number, sought, count = self._passages[passage]
            item, length = self.items[number], sought.count(b" ") + 1
            for first, end in of_passage:
                if count < GRAM_WORDS and end - first < length:  # a short one only as a whole
                    continue
                if count_words(words[first:end]) < min(GRAM_WORDS, count):
                    continue
                enough = min(WORD_BYTES * (end - first), ENOUGH_BYTES)
                if end - first < MOST * length and len(b"".join(words[first:end])) < enough:
                    continue
                first_piece = int(np.searchsorted(words_before, first, side="right")) - 1
                last_piece = max(int(np.searchsorted(words_before, end)) - 1, 0)
                start = pieces[min(first_piece, len(pieces) - 1)][0]
                stop = pieces[min(last_piece, len(pieces) - 1)][1]
                hits.add(Hit(item.benchmark, item.where, start, stop, text[start:stop]))
        return sorted(hits, key=lambda hit: (hit.start, hit.end, hit.item))


def _grams(words: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The byte where each word starts, and hashes (uint64) of the 8 and of the 13 words from it on.

    The last words start no 8-gram or 13-gram. The hash of a word takes its first and last eight
    bytes and its length: all of it for most words, and enough to find candidates.
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
    """Returns the documents without contaminated text, the hits, and the numbers of documents that
    were dropped or cut and of characters that were removed.

    "drop" leaves out contaminated documents. "cut" removes each hit with 200 characters on either
    side; the remaining pieces become documents `ID#0`, `ID#1`, ..., which stay on one side of the
    validation split.
    """
    kept, report = [], []
    counts = {"documents_dropped": 0, "documents_cut": 0, "characters_removed": 0}
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
    """Reports the benchmark items in `documents`.

    `on_progress` is called with the numbers of documents, bytes and hits so far.
    """
    hits, count, size = [], 0, 0
    for batch in batched(documents):
        hits += clean(batch, index, "drop")[1]
        count += len(batch)
        size += sum(len(document.text.encode()) for document in batch)
        on_progress(count, size, len(hits))
    return {
        "documents": count,
        "bytes": size,
        "benchmarks": summary(index, hits),
        "contaminated": hits,
    }


def too_short(counts: Mapping[str, int]) -> list[str]:
    """A line about the questions that were not looked for (`Index.too_short`), if there are any."""
    named = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    total = sum(counts.values())
    return [f"{total:,} benchmark questions are too short to look for: {named}"] if named else []


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
    """benchmark -> the numbers of items, of items found, of documents they were found in, and of
    questions too short to look for."""
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
