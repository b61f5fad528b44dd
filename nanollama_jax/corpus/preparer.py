"""Raw data -> shards and a manifest: one path for documents, conversations and preference pairs.

A `Preparation` says what is read, how a row becomes a record and what is left out: `Documents` in
corpus/prepare.py, `Rows` in corpus/finetuning.py. `prepare` does the rest: it checks that a
directory was prepared with the same inputs, keeps other processes out, runs the ranks
(corpus/executor.py), verifies the shards and writes the manifest last. The bytes on disk depend
neither on where the ranks ran, nor on interruptions.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nanollama_jax.console import console
from nanollama_jax.corpus import decontaminate
from nanollama_jax.corpus.executor import Executor, run_ranks, unfinished_ranks
from nanollama_jax.corpus.sources import is_gone, useful_ranks
from nanollama_jax.corpus.words import RULE
from nanollama_jax.data.shards import (
    MANIFEST,
    SPLITS,
    ShardWriter,
    check_same_inputs,
    finished,
    split_of,
    split_shards,
    totals,
    verify_shards,
)
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked, write_json


class Record(NamedTuple):
    """A document, conversation or pair, ready to be written."""

    data: bytes
    split_key: bytes  # records with equal keys fall on one side of the validation split
    tokens: int
    text_bytes: int


class LeftOut(NamedTuple):
    """Something that is left out or removed, which the manifest counts under `reason`."""

    reason: str
    count: int = 1
    detail: Any = None  # JSON; collected for the report beside the manifest


class Preparation(Protocol):
    """What is prepared. It is pickled, and its records are made in worker processes."""

    name: str
    url: str
    numbered: bool  # shards are named after their rank; otherwise there is a single rank

    def inputs(self) -> dict[str, Any]:
        """What decides the records, JSON: settings, and the source if its files are not gone."""

    def records(
        self, rank: int, ranks: int, index: decontaminate.Index | None
    ) -> Iterator[Record | LeftOut]:
        """This rank's records in order; `index` finds items of the benchmarks."""

    def manifest(self, inputs: dict[str, Any], done: "Prepared") -> dict[str, Any]:
        """The manifest; what was left out goes into a report in `done.out_dir`.

        Raises `BadInput` if nothing is left to train on.
        """


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the ranks of a preparation wrote and left out."""

    out_dir: Path
    splits: dict[str, dict[str, Any]]  # split -> shards and counts, as in the manifest
    left_out: Counter[str]  # reason -> count
    details: dict[str, list[Any]]  # reason -> details
    items: Path | None  # the benchmarks' items
    rank_tokens: list[int]  # written by each rank


@dataclasses.dataclass(frozen=True)
class _WriteRank:
    """The work of a rank: writes its shards, and returns what is in them and what was left out."""

    preparation: Preparation
    out_dir: Path
    validation_fraction: float
    shard_tokens: int
    items: Path | None

    def __call__(self, rank: int, ranks: int) -> dict[str, Any]:
        index = decontaminate.load_index(self.items) if self.items else None
        number = f"-{rank:05d}" if self.preparation.numbered else ""
        writers = {
            split: ShardWriter(self.out_dir, f"{split}{number}", self.shard_tokens)
            for split in SPLITS
        }
        left_out: Counter[str] = Counter()
        details: dict[str, list[Any]] = {}
        for record in self.preparation.records(rank, ranks, index):
            if isinstance(record, Record):
                split = split_of(record.split_key, self.validation_fraction)
                writers[split].write(
                    record.data, tokens=record.tokens, text_bytes=record.text_bytes
                )
                continue
            left_out[record.reason] += record.count
            if record.detail is not None:
                details.setdefault(record.reason, []).append(record.detail)
        written = {split: writer.close() for split, writer in writers.items()}
        return written | {"left_out": left_out, "details": details}


def prepare(
    preparation: Preparation,
    out_dir: Path,
    *,
    validation_fraction: float,
    shard_tokens: int,
    benchmarks: Mapping[str, str],
    tasks: int = 1,
    executor: Executor = Executor(),  # noqa: B008  it is frozen
) -> dict[str, Any] | None:
    """Prepares into `out_dir` and returns the manifest; resumes what was interrupted.

    `tasks` is the number of ranks (fewer if the source has few files); it decides what is in which
    shard. Returns None where `executor` shares the ranks with other processes. What is prepared
    already is verified and used, even if the files that it was made of are gone. Raises `BadInput`
    for bad data, for other inputs than before, and for Ctrl-C.
    """
    name, url = preparation.name, preparation.url
    inputs = preparation.inputs()
    if manifest := finished(out_dir, inputs):
        if is_gone(url):
            console.print(f"{name}: the files of {url} are gone: using {out_dir}, which is intact")
        return manifest
    tasks = int(min(tasks, useful_ranks(url)))
    logs = out_dir / "logs"
    layout = inputs | {"tasks": tasks, "shard_tokens": shard_tokens}
    items = logs / f"benchmarks_{RULE}.json" if benchmarks else None
    work = _WriteRank(preparation, out_dir, validation_fraction, shard_tokens, items)
    if executor.rank is not None:  # beside others, after one that did what follows
        if not (logs / "inputs.json").exists():
            raise BadInput(f"{out_dir} is not set up: run this once without rank before the ranks")
        check_same_inputs(out_dir, json.loads((logs / "inputs.json").read_text()), layout)
        return run_ranks(work, executor, name=name, tasks=tasks, logs=logs)

    logs.mkdir(parents=True, exist_ok=True)
    busy = f"{out_dir} is being prepared by another process: wait for it to end"
    with locked(logs / "lock", busy):
        # Until a rank has finished, a mistake in the inputs can still be corrected.
        begun = len(unfinished_ranks(tasks, logs)) < tasks
        if begun and (logs / "inputs.json").exists():
            check_same_inputs(out_dir, json.loads((logs / "inputs.json").read_text()), layout)
        if items and not (begun and items.exists()):
            decontaminate.save_items(decontaminate.read_benchmarks(benchmarks), items)
        if not (begun and (logs / "inputs.json").exists()):
            write_json(logs / "inputs.json", layout)
        ranks = run_ranks(work, executor, name=name, tasks=tasks, logs=logs)
        if ranks is None:
            return None
        try:
            manifest = preparation.manifest(inputs, _merged(ranks, out_dir, items))
        except BadInput:  # with these inputs it is of no use
            shutil.rmtree(logs / "ranks")
            raise
        verify_shards(out_dir, manifest, just_written=not begun)
        write_json(out_dir / MANIFEST, manifest)
        _remove_leftovers(out_dir, manifest)
    return manifest


def _merged(ranks: list[dict[str, Any]], out_dir: Path, items: Path | None) -> Prepared:
    shards = {split: [shard for rank in ranks for shard in rank[split]] for split in SPLITS}
    left_out: Counter[str] = Counter()
    details: dict[str, list[Any]] = {}
    for rank in ranks:
        left_out.update(rank["left_out"])
        for reason, found in rank["details"].items():
            details.setdefault(reason, []).extend(found)
    rank_tokens = [
        sum(shard["tokens"] for split in SPLITS for shard in rank[split]) for rank in ranks
    ]
    splits = {split: totals(shards[split]) for split in SPLITS}
    return Prepared(out_dir, splits, left_out, details, items, rank_tokens)


def _remove_leftovers(out_dir: Path, manifest: dict[str, Any]) -> None:
    """Removes what ranks that were killed left behind."""
    named = {path for split in SPLITS for path in split_shards(out_dir, manifest, split)}
    for split in SPLITS:
        for path in out_dir.glob(f"{split}-[0-9]*.array_record*"):
            if path not in named:
                path.unlink()
