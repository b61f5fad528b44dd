"""Finds near-duplicate documents within and across sources by MinHash (Broder 1997), and reports
which of them to leave out of preparation.

Two documents are duplicates if their Jaccard similarity, the share of all their word 5-grams that
both have, is at least `threshold`. It is estimated from 256 hashes (standard deviation at 0.8:
0.018 to 0.025). Words are those of corpus/words.py: letters, in Chinese and other scripts without
spaces. Duplicates of duplicates form one cluster, of which the first document is kept. Of texts
under five words only exact copies count.

Signatures are stored beside the report, 0.9 GB per million documents, and compared in one process:
0.8 GB of memory and half a minute per million, measured on a million of which 100,000 were copies.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rensa import RMinHash

from nanollama_jax.corpus.executor import Executor, cores, report_progress, run_ranks
from nanollama_jax.corpus.sources import read_documents
from nanollama_jax.corpus.words import normalise
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json

FORMAT = "nanollama_jax near-duplicates, version 1"
SHINGLE_WORDS = 5
HASHES = 256
SEED = 1
_RECALL = 0.99  # of pairs just at the threshold, from a single comparison of bands
_EXAMPLES, _BEGINNING = 6, 300  # pairs in the report, and characters of each document
_FACTORS = np.array(
    [pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, HASHES + 1)], np.uint64
)


def signature(text: str) -> np.ndarray:
    """MinHash of the text's word 5-grams: uint16 of shape (HASHES,), the same in every process.

    The share of places in which two signatures agree estimates the Jaccard similarity. rensa's
    hashes have 32 bits; 16 of them estimate it as well in half the memory (different hashes agree
    by chance in 1 of 65,536). A text without a 5-gram gets a hash of all its characters.
    """
    words = np.array(RMinHash.hash_token_sets([normalise(text).split()])[0], np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.frombuffer(hashlib.shake_128(text.encode()).digest(2 * HASHES), np.uint16)
    count = len(words) - SHINGLE_WORDS + 1
    shingles = sum(words[at : at + count] * _FACTORS[at] for at in range(SHINGLE_WORDS))
    return np.array(
        RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, count], HASHES, SEED).to_rows()[
            0
        ],
        np.uint32,
    ).astype(np.uint16)


def _write_signatures(url: str, folder: Path, rank: int, ranks: int) -> None:
    """Writes the signatures of this rank's documents of `url` to `RANK.signatures`, and [id, bytes,
    beginning] of each to `RANK.jsonl`."""
    documents = text_bytes = 0
    path = folder / f"{rank:05d}"
    with (
        open(path.with_suffix(".signatures"), "wb") as signatures,
        open(path.with_suffix(".jsonl"), "w") as lines,
    ):
        for document in read_documents(url, rank, ranks):
            size = len(document.text.encode())
            signatures.write(signature(document.text).tobytes())
            lines.write(json.dumps([document.id, size, document.text[:_BEGINNING]]) + "\n")
            documents, text_bytes = documents + 1, text_bytes + size
            report_progress(rank, (documents, 0, text_bytes))


def find_near_duplicates(
    urls: Sequence[str], out: str | os.PathLike, *, threshold: float, workers: int = 0
) -> dict[str, Any]:
    """Writes the report to `out` and returns it; it does not depend on `workers` (0: one per core).

    Its `leave_out` lists {id, duplicate_of, jaccard}: the document of the cluster that is kept, and
    the estimated similarity to it. That can be below the threshold if other documents link the two;
    `linked_by_others` counts these. The first document of a cluster is kept: by source in the order
    given, then by id, with numbers compared as numbers. Raises `BadInput` for sources that cannot
    be read or that overlap, a threshold outside 0.5 to 1, and an `out` that exists.
    """
    out = Path(out)
    if not 0.5 <= threshold <= 1:
        raise BadInput(
            f"threshold={threshold} must be between 0.5 and 1: below 0.5, similar documents count "
            "as copies"
        )
    if out.exists():
        raise BadInput(f"{out} exists: remove it or choose another --out")
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}-", dir=out.absolute().parent
    ) as temporary:
        folders = [Path(temporary) / str(number) for number in range(len(urls))]
        for url, folder in zip(urls, folders):
            folder.mkdir()
            run_ranks(
                functools.partial(_write_signatures, url, folder),
                Executor(workers=workers),
                name=url,
                tasks=workers or cores(),
                logs=folder / "logs",
            )
        signatures = _load_signatures(folders)
        if not len(signatures):
            raise BadInput(f"no document in {', '.join(urls)}: there is no text")
        report = _report(folders, signatures, _clusters(signatures, threshold), threshold)
    settings = {
        "threshold": threshold,
        "shingle_words": SHINGLE_WORDS,
        "hashes": HASHES,
        "seed": SEED,
    }
    report = {"format": FORMAT, "settings": settings, "sources": list(urls)} | report
    write_json(out, report)
    return report


def _load_signatures(folders: Sequence[Path]) -> np.ndarray:
    paths = [path for folder in folders for path in sorted(folder.glob("*.signatures"))]
    loaded, at = np.empty(sum(path.stat().st_size for path in paths), np.uint8), 0
    for path in paths:
        with open(path, "rb") as file:
            at += file.readinto(loaded[at:])
    return loaded.view(np.uint16).reshape(-1, HASHES)


def _load_documents(folders: Sequence[Path]) -> Iterator[tuple[int, str, int, str]]:
    """(number of the source, id, bytes, beginning), in the order of `_load_signatures`."""
    for number, folder in enumerate(folders):
        for path in sorted(folder.glob("*.jsonl")):
            with open(path) as lines:
                for line in lines:
                    yield number, *json.loads(line)


def _clusters(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each document the root of its cluster: all documents that links between similar ones
    connect.

    Candidates share a band of hashes (locality-sensitive hashing). A band has the most hashes that
    still find `_RECALL` of the pairs at the threshold. All pairs of candidates are compared, except
    pairs that are connected already, so that clusters do not depend on the order of documents.
    """
    rows = max(
        rows
        for rows in range(1, HASHES + 1)
        if 1 - (1 - threshold**rows) ** (HASHES // rows) >= _RECALL
    )
    parents = np.arange(len(signatures))
    for band in range(HASHES // rows):
        parents = _roots(parents, parents)
        keys = np.zeros(len(signatures), np.uint64)
        for row in range(rows):
            keys += signatures[:, band * rows + row] * _FACTORS[row]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        apart = (keys[1:] == keys[:-1]) & (parents[order[1:]] != parents[order[:-1]])
        buckets = np.unique(keys[1:][apart])
        for start, end in zip(
            np.searchsorted(keys, buckets).tolist(),
            np.searchsorted(keys, buckets, side="right").tolist(),
        ):
            bucket = order[start:end]
            roots = _roots(parents, bucket)
            for number, document in enumerate(bucket):
                if (roots == roots[0]).all():
                    break
                others = number + 1 + np.flatnonzero(roots[number + 1 :] != roots[number])
                similar = (signatures[bucket[others]] == signatures[document]).mean(1) >= threshold
                for root in np.unique(roots[others[similar]]):
                    parents[root] = roots[number]
                    roots[roots == root] = roots[number]
    return _roots(parents, parents)


def _roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    roots = parents[documents]
    while (parents[roots] != roots).any():
        roots = parents[roots]
    return roots


def _report(
    folders: Sequence[Path], signatures: np.ndarray, roots: np.ndarray, threshold: float
) -> dict[str, Any]:
    text_bytes, clusters, beginnings = 0, defaultdict(list), {}
    clustered = np.bincount(roots)[roots] > 1
    for index, (source, document_id, size, beginning) in enumerate(_load_documents(folders)):
        text_bytes += size
        if clustered[index]:
            key = [
                int(part) if odd % 2 else part
                for odd, part in enumerate(re.split("([0-9]+)", document_id))
            ]
            clusters[roots[index]].append((source, key, document_id, size, index))
            beginnings[document_id] = beginning
    leave_out, left_out_bytes = [], 0
    for (*_, kept_id, _, kept), *others in sorted(map(sorted, clusters.values())):
        for *_, document_id, size, index in others:
            jaccard = float((signatures[index] == signatures[kept]).mean())
            leave_out.append({"id": document_id, "duplicate_of": kept_id, "jaccard": jaccard})
            left_out_bytes += size
    ids = {entry["id"] for entry in leave_out}
    times_read = Counter(
        document_id for _, document_id, *_ in _load_documents(folders) if document_id in ids
    )
    if repeated := [document_id for document_id, times in times_read.items() if times > 1]:
        raise BadInput(f"two documents have the id {repeated[0]}: name sources that do not overlap")
    sizes = Counter(map(len, clusters.values()))
    linked_by_others = sum(entry["jaccard"] < threshold for entry in leave_out)
    examples = sorted(leave_out, key=lambda entry: entry["jaccard"])[
        :: len(leave_out) // _EXAMPLES + 1
    ]
    examples = [
        entry | {"texts": [beginnings[entry["id"]], beginnings[entry["duplicate_of"]]]}
        for entry in examples
    ]
    counts = {"documents": len(signatures), "bytes": text_bytes, "clusters": len(clusters)}
    counts |= {
        "cluster_sizes": {str(size): sizes[size] for size in sorted(sizes)},
        "linked_by_others": linked_by_others,
    }
    counts |= {"documents_to_leave_out": len(leave_out), "bytes_to_leave_out": left_out_bytes}
    return counts | {"examples": examples, "leave_out": leave_out}


def load_left_out(path: str | os.PathLike, url: str) -> frozenset[str]:
    """The ids to leave out, from a report.

    Raises `BadInput` if the report is missing, damaged, something else, or not about `url`.
    """
    try:
        report = json.loads(Path(path).read_text())
        if report["format"] != FORMAT:
            raise ValueError
        if url not in report["sources"]:
            raise BadInput(
                f"{path} is about {', '.join(report['sources'])}, not {url}: write the URL as in "
                "the report, because ids begin with it"
            )
        return frozenset(entry["id"] for entry in report["leave_out"])
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} is missing, damaged, or not a report of near-duplicates: make it with python "
            "tools/near_duplicates.py"
        ) from error
