"""Text -> decontaminated, tokenised documents on disk, for pre-training.

A document's record is its token ids, little-endian, without BOS and EOS (data/shards.py). The work
is cut into a fixed number of ranks; see corpus/preparer.py for what happens to them.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nanollama_jax.console import Table, console
from nanollama_jax.corpus import decontaminate, preparer
from nanollama_jax.corpus.executor import Executor, report_progress
from nanollama_jax.corpus.filters import filter_named
from nanollama_jax.corpus.near_duplicates import load_left_out
from nanollama_jax.corpus.preparer import LeftOut, Prepared, Record
from nanollama_jax.corpus.sources import (
    Document,
    about_source,
    batched,
    is_gone,
    licence_of,
    read_documents,
)
from nanollama_jax.data.shards import MANIFEST, SPLITS, dtype_for
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json
from nanollama_jax.tokenizer import Tokenizer, train

CONTAMINATED = "contaminated_ids.json"
SHARD_TOKENS = 2**26
_SAMPLE_STREAMS = 8  # a tokenizer's sample is the beginnings of this many ranks' shares


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a source; see `prepare_source` for the fields."""

    name: str
    url: str
    licence: str
    tokenizer: Tokenizer  # the object: a file could change while ranks run
    validation_fraction: float
    max_tokens: int
    keep: str
    leave_out: str
    benchmarks: dict[str, str]
    contaminated: str
    numbered: bool = dataclasses.field(default=True, init=False)

    def inputs(self) -> dict[str, Any]:
        report = Path(self.leave_out).read_bytes() if self.leave_out else None
        inputs = {
            "url": self.url,
            "tokenizer_sha256": self.tokenizer.sha256,
            "validation_fraction": self.validation_fraction,
            "max_tokens": self.max_tokens,
            "keep": self.keep,
            "leave_out_sha256": hashlib.sha256(report).hexdigest() if report is not None else "",
            "benchmarks": self.benchmarks,
        }
        inputs |= {"contaminated": self.contaminated} if self.benchmarks else {}
        return inputs | ({} if is_gone(self.url) else about_source(self.url))

    def records(
        self, rank: int, ranks: int, index: decontaminate.Index | None
    ) -> Iterator[Record | LeftOut]:
        dtype = np.dtype(dtype_for(self.tokenizer.vocab_size)).newbyteorder("<")
        max_tokens = -(-self.max_tokens // ranks) or np.inf
        left_out, counts = [], np.zeros(3, np.int64)
        for documents in batched(self._kept(rank, ranks, left_out)):
            yield from left_out
            left_out.clear()
            if index:
                documents, hits, removed = decontaminate.clean(documents, index, self.contaminated)
                yield from (LeftOut("hits", detail=hit) for hit in hits)
                yield from (LeftOut(reason, count) for reason, count in removed.items())
            encoded = self.tokenizer.encode_batch([document.text for document in documents])
            for document, ids in zip(documents, encoded):
                text = document.text.encode()
                # Equal documents never fall on both sides of the split.
                key = document.split_key.encode() or text
                yield Record(np.array(ids, dtype).tobytes(), key, len(ids), len(text))
                counts += (1, len(ids), len(text))
                if counts[1] >= max_tokens:
                    break
            report_progress(rank, counts.tolist())
            if counts[1] >= max_tokens:
                return
        yield from left_out

    def _kept(self, rank: int, ranks: int, left_out: list[LeftOut]) -> Iterator[Document]:
        keep = filter_named(self.keep)
        duplicates = load_left_out(self.leave_out, self.url) if self.leave_out else frozenset()
        for document in read_documents(self.url, rank, ranks):
            if document.id in duplicates:
                left_out.append(LeftOut("near_duplicates"))
            elif keep(document.text):
                yield document
            else:
                left_out.append(LeftOut("filtered"))

    def manifest(self, inputs: dict[str, Any], done: Prepared) -> dict[str, Any]:
        self._check_splits(done.splits)
        tokens, ranks = sum(done.rank_tokens), len(done.rank_tokens)
        if tokens < self.max_tokens and max(done.rank_tokens) * ranks >= self.max_tokens:
            console.print(
                f"{self.name}: {tokens:,} of {self.max_tokens:,} tokens: some ranks had less than "
                "their share; lower data.prepare_tasks to get more"
            )
        manifest = {
            "name": self.name,
            "licence": self.licence or licence_of(self.url),
            "dtype": dtype_for(self.tokenizer.vocab_size),
            "vocab_size": self.tokenizer.vocab_size,
        }
        return (
            manifest
            | inputs
            | {"left_out": {why: done.left_out[why] for why in ("filtered", "near_duplicates")}}
            | {"decontamination": self._decontamination(done), "splits": done.splits}
        )

    def _check_splits(self, splits: dict[str, dict[str, Any]]) -> None:
        documents = sum(split["documents"] for split in splits.values())
        if not documents:
            raise BadInput(
                f"source {self.name} has no documents: {self.url} holds no text"
                + (" that is kept" if self.keep or self.benchmarks else "")
            )
        for split, change in (("train", "lower"), ("validation", "raise")):
            wanted = split == "train" or self.validation_fraction > 0
            if wanted and not splits[split]["documents"]:
                raise BadInput(
                    f"source {self.name} has {documents} documents and none fell into {split} at "
                    f"validation_fraction={self.validation_fraction}: {change} "
                    "data.validation_fraction"
                )

    def _decontamination(self, done: Prepared) -> dict[str, Any] | None:
        """For the manifest; each hit goes into `contaminated_ids.json`."""
        if done.items is None:
            return None
        hits = done.details.get("hits", [])
        found = decontaminate.summary(decontaminate.load_index(done.items), hits)
        report = {"policy": self.contaminated, "benchmarks": found, "contaminated": hits}
        write_json(done.out_dir / CONTAMINATED, report)
        return {
            "policy": self.contaminated,
            "benchmarks": found,
            "benchmarks_sha256": hashlib.sha256(done.items.read_bytes()).hexdigest(),
            "documents_dropped": done.left_out["documents_dropped"],
            "documents_cut": done.left_out["documents_cut"],
            "characters_removed": done.left_out["characters_removed"],
        }


def prepare_source(
    name: str,
    url: str,
    licence: str,
    out_dir: str | os.PathLike,
    tokenizer_path: str | os.PathLike,
    *,
    validation_fraction: float,
    tasks: int,
    executor: Executor = Executor(),  # noqa: B008  it is frozen
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int = 0,
    keep: str = "",
    leave_out: str = "",
    benchmarks: Mapping[str, str] | None = None,
    contaminated: str = "drop",
) -> dict[str, Any] | None:
    """Prepares `url` into `out_dir` and returns its manifest; resumes what was interrupted.

    An empty `licence` means that of the URL, where it is known. Each of the `tasks` ranks stops
    after its share of `max_tokens` (0: all there is). `keep` names a filter (corpus/filters.py),
    `leave_out` a report of near-duplicates (corpus/near_duplicates.py). Documents are searched for
    `benchmarks`, name -> URL; `contaminated` is one of decontaminate.POLICIES. Returns None where
    `executor` shares the ranks with other processes.

    Raises `BadInput` for bad text (finished ranks stay), for a source without documents or with an
    empty split, for Ctrl-C, and if `out_dir` was prepared with other settings, from another list of
    files, or from files that have changed since.
    """
    if not 0 <= validation_fraction < 1:
        raise BadInput(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
    if tasks < 1:
        raise BadInput(f"preparation needs at least one task, not {tasks}")
    if contaminated not in decontaminate.POLICIES:
        raise BadInput(
            f"corpora.{name}.contaminated={contaminated!r}: choose one of "
            f"{', '.join(decontaminate.POLICIES)}"
        )
    filter_named(keep)
    if leave_out:
        load_left_out(leave_out, url)  # refuses a report that cannot be used
    benchmarks = decontaminate.with_url(benchmarks)
    documents = Documents(
        name=name,
        url=url,
        licence=licence,
        tokenizer=Tokenizer(tokenizer_path),
        validation_fraction=validation_fraction,
        max_tokens=max_tokens,
        keep=keep,
        leave_out=leave_out,
        benchmarks=benchmarks,
        contaminated=contaminated,
    )
    return preparer.prepare(
        documents,
        Path(out_dir),
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        benchmarks=benchmarks,
        tasks=tasks,
        executor=executor,
    )


def train_tokenizer_for(
    urls: Sequence[str], path: str | os.PathLike, vocab_size: int, max_bytes: int
) -> None:
    """Trains a tokenizer on equal shares of the sources, `max_bytes` in all, unless `path` exists.

    No source is read further than needed.
    """
    if not Path(path).exists():
        texts = (text for url in urls for text in _sample(url, max_bytes // len(urls)))
        train(texts, path, vocab_size, max_bytes)


def _sample(url: str, max_bytes: int) -> Iterator[str]:
    """The first document of each stream, then the second of each, ..., `max_bytes` in all."""
    streams = [read_documents(url, rank, _SAMPLE_STREAMS) for rank in range(_SAMPLE_STREAMS)]
    while streams:
        for stream in list(streams):
            if document := next(stream, None):
                text = document.text.encode()[:max_bytes]
                yield text.decode(errors="ignore")  # the cut may be within a character
                max_bytes -= len(text)
                if max_bytes == 0:
                    return
            else:
                streams.remove(stream)


def prepare_all(config: ConfigDict, executor: Executor = Executor()) -> bool:  # noqa: B008
    """Trains the tokenizer if its file is missing, then prepares every corpus of `config.corpora`
    into `config.data.dir`/NAME.

    Returns False where `executor` shares the work with other processes, and it is not complete.
    """
    tokenizer = _tokenizer_of(config, executor)
    path = Path(config.tokenizer.path)
    for name, reason in tokenizer.not_exportable.items():
        console.print(
            f"warning: no model trained with {path} can be exported as {name}: the tokenizer "
            f"{reason}"
        )
    directories = {name: Path(config.data.dir) / name for name in config.corpora}
    already = all((directory / MANIFEST).exists() for directory in directories.values())
    manifests = [
        prepare_source(
            name,
            **config.corpora[name],
            out_dir=directory,
            tokenizer_path=path,
            validation_fraction=config.data.validation_fraction,
            tasks=config.data.prepare_tasks,
            executor=executor,
            benchmarks=config.data.benchmarks,
        )
        for name, directory in directories.items()
    ]
    if None in manifests:
        return False
    if already:
        console.print(f"{config.data.dir}: already prepared: {', '.join(directories)}")
    else:
        _print_summary(manifests)
    return True


def _tokenizer_of(config: ConfigDict, executor: Executor) -> Tokenizer:
    path = Path(config.tokenizer.path)
    if not path.exists():
        if executor.rank is not None:
            raise BadInput(f"tokenizer {path} is missing: run this once without rank first")
        if absent := [name for name in config.tokenizer.sources if name not in config.corpora]:
            raise BadInput(
                f"tokenizer {path} is missing, and {absent[0]}, which it is trained on, is not in "
                "this config's corpora: prepare the config that has it first, or set "
                "tokenizer.path or tokenizer.sources"
            )
        console.print(
            f"training {path}: {config.tokenizer.vocab_size:,} pieces on "
            f"{', '.join(config.tokenizer.sources)}"
        )
        urls = [config.corpora[name].url for name in config.tokenizer.sources]
        train_tokenizer_for(
            urls, path, config.tokenizer.vocab_size, config.tokenizer.training_bytes
        )
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != config.tokenizer.vocab_size:
        raise BadInput(
            f"tokenizer {path} has {tokenizer.vocab_size:,} pieces and tokenizer.vocab_size is "
            f"{config.tokenizer.vocab_size:,}: change one of them"
        )
    return tokenizer


def _print_summary(manifests: Sequence[dict[str, Any]]) -> None:
    table = Table("source", "documents", "tokens", "bytes per token", "validation", "contaminated")
    too_short: dict[str, int] = {}
    for manifest in manifests:
        documents, tokens, text_bytes = (
            sum(manifest["splits"][split][key] for split in SPLITS)
            for key in ("documents", "tokens", "bytes")
        )
        contaminated = "not searched"
        if found := manifest.get("decontamination"):
            contaminated = f"{found['documents_dropped'] + found['documents_cut']:,}"
            for name, counts in found["benchmarks"].items():
                too_short[name] = counts.get("too_short", 0)
        table.add_row(
            manifest["name"],
            f"{documents:,}",
            f"{tokens:,}",
            f"{text_bytes / max(tokens, 1):.2f}",
            f"{manifest['splits']['validation']['tokens']:,}",
            contaminated,
        )
    console.print(table)
    for line in decontaminate.too_short(too_short):
        console.print(line)
