"""Raw text -> tokenised shards on disk, with datatrove: `ReadSource` and `WriteTokens` are blocks of a pipeline of its.

A corpus is a directory: ArrayRecord shards of one document a record (token ids, raw little-endian, without BOS and EOS), and
`manifest.json`, written last, with counts and a checksum for each shard. A shard is written under a temporary name and renamed when
whole. The work is cut into a fixed number of ranks; a finished rank is not done again, so the same command goes on where a killed one
stopped, and the bytes on disk depend on neither that nor the number of workers.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from nanollama_jax.data.executor import PoolExecutor, report_progress, show_progress
from nanollama_jax.data.sources import matched_files, read_documents
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer, train

SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26
MANIFEST = "manifest.json"
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 2**20, 1024  # what is encoded at once
_SAMPLE_STREAMS = 8  # a tokenizer's sample is the beginnings of this many ranks' shares: of 8 files, where a source has as many


class ReadSource(PipelineStep):
    """Reads a source URL (data/sources.py)."""

    name, type = "source", "Reader"

    def __init__(self, url: str):
        super().__init__()
        self.url = url

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        return read_documents(self.url, rank, world_size)


class WriteTokens(PipelineStep):
    """Tokenises documents and writes this rank's shards, then `logs/shards/RANK.json`, which tells what is in them."""

    name, type = "tokens", "Writer"

    def __init__(self, out_dir: Path, tokenizer: Tokenizer, validation_fraction: float, shard_tokens: int):
        super().__init__()
        self.out_dir, self.tokenizer = Path(out_dir), tokenizer  # the object: a file could change while ranks run
        self.validation_fraction, self.shard_tokens = validation_fraction, shard_tokens

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokenizer = self.tokenizer
        dtype = np.dtype(_dtype(tokenizer.vocab_size)).newbyteorder("<")
        writers = {split: _ShardWriter(self.out_dir, f"{split}-{rank:05d}", self.shard_tokens) for split in SPLITS}
        counts = np.zeros(3, np.int64)
        for documents in _batches(data):
            for document, ids in zip(documents, tokenizer.encode_batch([document.text for document in documents])):
                text = document.text.encode()
                # By a hash of the text, so that equal documents never end up on both sides, or of what the source names instead.
                split_key = document.metadata["split_key"].encode() if "split_key" in document.metadata else text
                hashed = int.from_bytes(hashlib.blake2b(split_key, digest_size=8).digest(), "little")
                split = "validation" if hashed < self.validation_fraction * 2**64 else "train"
                writers[split].write(np.array(ids, dtype).tobytes(), tokens=len(ids), text_bytes=len(text))
                counts += (1, len(ids), len(text))
            report_progress(rank, counts.tolist())
            yield from documents
        shards = {split: writer.close() for split, writer in writers.items()}
        _write_json(self.out_dir / "logs" / "shards" / f"{rank:05d}.json", shards)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Writes records into `PREFIX-000.array_record`, `-001`, ... of at most `shard_tokens` each; a longer document has one to itself."""

    def __init__(self, directory: Path, prefix: str, shard_tokens: int):
        self._directory, self._prefix, self._shard_tokens = directory, prefix, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._writer = None

    def write(self, record: bytes, *, tokens: int, text_bytes: int) -> None:
        if self._writer and self._shard["tokens"] + tokens > self._shard_tokens:
            self._finish()
        if not self._writer:
            self._shard = {"file": f"{self._prefix}-{len(self._shards):03d}.array_record", "documents": 0, "tokens": 0, "bytes": 0}
            self._temporary = self._directory / f"{self._shard['file']}.tmp"
            self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")  # a group is what one random read decodes
        self._writer.write(record)
        for key, count in (("documents", 1), ("tokens", tokens), ("bytes", text_bytes)):
            self._shard[key] += count

    def close(self) -> list[dict[str, Any]]:
        if self._writer:
            self._finish()
        return self._shards

    def _finish(self) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:  # writing is in the background: it is here that a full disk shows
            raise BadInput(f"shard {self._temporary} cannot be written ({error}): is the disk full?") from error
        self._writer = None
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
            self._shard |= {"size": os.path.getsize(self._temporary), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        os.replace(self._temporary, self._directory / self._shard["file"])
        self._shards.append(self._shard)


def prepare_source(
    name: str,
    url: str,
    licence: str,
    out_dir: str | os.PathLike,
    tokenizer_path: str | os.PathLike,
    *,
    validation_fraction: float,
    tasks: int,
    workers: int,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Prepares `url` into `out_dir` and returns its manifest; goes on from where it stopped if it was killed.

    Where it is already done it reads all shards once and compares their checksums, which for a large corpus takes a while.
    `tasks` is the number of ranks, and decides what is in which shard; `workers` of them run at a time. Raises `BadInput` for bad text
    (what other ranks finished stays), for a source without documents or with an empty split, for Ctrl-C, and if `out_dir` holds
    something else, or was made of another list of files.
    """
    out_dir, tokenizer = Path(out_dir), Tokenizer(tokenizer_path)
    if not 0 <= validation_fraction < 1:
        raise BadInput(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
    if tasks < 1 or workers < 1:
        raise BadInput(f"preparation needs at least one task and one worker, not {tasks} and {workers}")
    inputs = {"url": url, "tokenizer_sha256": tokenizer.sha256, "validation_fraction": validation_fraction}
    if (files := matched_files(url)) is not None:
        # Documents are dealt by the files' order: with another list, what finished ranks hold would be read twice, or never.
        inputs["files"] = {"count": len(files), "sha256": hashlib.sha256("\0".join(files).encode(errors="surrogateescape")).hexdigest()}
    if (out_dir / MANIFEST).exists():
        manifest = load_manifest(out_dir)
        _check_same_inputs(out_dir, manifest, inputs)
        verify_shards(out_dir, manifest, checksums=True)
        return manifest

    logs = out_dir / "logs"
    (logs / "shards").mkdir(parents=True, exist_ok=True)
    with open(logs / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{out_dir} is being prepared by another process: wait for it to end") from error
        layout = inputs | {"tasks": tasks, "shard_tokens": shard_tokens}
        if (logs / "inputs.json").exists():
            _check_same_inputs(out_dir, json.loads((logs / "inputs.json").read_text()), layout)
        else:
            _write_json(logs / "inputs.json", layout)
        blocks = [ReadSource(url), WriteTokens(out_dir, tokenizer, validation_fraction, shard_tokens)]
        try:
            with show_progress(name, tasks) as on_progress:
                PoolExecutor(blocks, tasks=tasks, workers=workers, logging_dir=str(logs)).run(on_progress)
        except BrokenProcessPool as error:
            raise BadInput(f"a worker preparing {name} was killed (out of memory?): run the same command to go on from there") from error
        except KeyboardInterrupt as error:
            raise BadInput("stopped; run the same command to go on") from error

        ranks = [json.loads((logs / "shards" / f"{rank:05d}.json").read_text()) for rank in range(tasks)]
        splits = {split: _totals([shard for rank in ranks for shard in rank[split]]) for split in SPLITS}
        if not any(split["documents"] for split in splits.values()):
            raise BadInput(f"source {name} has no documents: {url} holds no text")
        for split, change in (("train", "lower"), ("validation", "raise")):
            if not splits[split]["documents"] and (split == "train" or validation_fraction > 0):
                documents = sum(counts["documents"] for counts in splits.values())
                raise BadInput(
                    f"source {name} has {documents} documents and none fell into {split} at validation_fraction={validation_fraction}: "
                    f"{change} data.validation_fraction and remove {out_dir}"
                )
        manifest = {"name": name, "licence": licence, "dtype": _dtype(tokenizer.vocab_size), "vocab_size": tokenizer.vocab_size}
        manifest |= inputs | {"splits": splits}
        verify_shards(out_dir, manifest)
        _write_json(out_dir / MANIFEST, manifest)
        named = {path for split in SPLITS for path in split_shards(out_dir, manifest, split)}
        for path in set(out_dir.glob("*.array_record*")) - named:  # what ranks that were killed left
            path.unlink()
    return manifest


def _check_same_inputs(out_dir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if key == "files" and old.get(key, value) != value:
            raise BadInput(
                f"{out_dir} was prepared from another list of files than {new['url']} now matches ({old[key]['count']} then, "
                f"{value['count']} now): remove {out_dir} and prepare it again, or choose another data.dir"
            )
        if old.get(key) != value:
            raise BadInput(f"{out_dir} was prepared with {key}={old.get(key)!r}, not {value!r}: remove it, or choose another data.dir")


def _totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")} | {"shards": shards}


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises `BadInput` if there is none."""
    path = Path(directory) / MANIFEST
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadInput(f"{directory} is not prepared: run python tools/prepare_data.py --config with the same config first") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is damaged ({error}): remove {directory} and prepare it again") from error


def split_shards(directory: str | os.PathLike, manifest: dict[str, Any], split: str) -> list[Path]:
    """Paths of a split's shards, in order."""
    return [Path(directory) / shard["file"] for shard in manifest["splits"][split]["shards"]]


def verify_shards(directory: str | os.PathLike, manifest: dict[str, Any], *, checksums: bool = False) -> None:
    """Raises `BadInput` that names the first shard which is missing or has another size; with `checksums`, reads them all."""
    for split in SPLITS:
        for path, shard in zip(split_shards(directory, manifest, split), manifest["splits"][split]["shards"]):
            remedy = f"restore it, or remove {directory} and prepare it again"
            if not path.exists():
                raise BadInput(f"shard {path} is missing: {remedy}")
            if path.stat().st_size != shard["size"]:
                raise BadInput(f"shard {path} has {path.stat().st_size:,} bytes where there were {shard['size']:,}: {remedy}")
            if checksums:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                        raise BadInput(f"shard {path} is damaged, its checksum differs: {remedy}")


def train_tokenizer_for(urls: Sequence[str], path: str | os.PathLike, vocab_size: int, max_bytes: int) -> None:
    """Trains a tokenizer on equal shares of the sources, `max_bytes` in all, unless `path` exists. No source is read further than needed."""
    if not Path(path).exists():
        texts = (text for url in urls for text in _sample(url, max_bytes // len(urls)))
        train(texts, path, vocab_size, max_bytes)


def _sample(url: str, max_bytes: int) -> Iterator[str]:
    """The first document of each stream, then the second of each, ..., until there are `max_bytes`."""
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has no affinity


def prepare_all(config: ConfigDict) -> None:
    """Trains the tokenizer if its file is missing, then prepares every corpus of `config.corpora` into `config.data.dir`/NAME."""
    path = Path(config.tokenizer.path)
    if not path.exists():
        if absent := [name for name in config.tokenizer.sources if name not in config.corpora]:
            raise BadInput(
                f"tokenizer {path} is missing, and {absent[0]}, which it is trained on, is not in this config's corpora: "
                "prepare the config that has it first, or set tokenizer.path or tokenizer.sources"
            )
        print(f"training {path}: {config.tokenizer.vocab_size:,} pieces on {', '.join(config.tokenizer.sources)}", flush=True)
        urls = [config.corpora[name].url for name in config.tokenizer.sources]
        train_tokenizer_for(urls, path, config.tokenizer.vocab_size, config.tokenizer.training_bytes)
    if (found := Tokenizer(path).vocab_size) != config.tokenizer.vocab_size:
        raise BadInput(f"tokenizer {path} has {found:,} pieces and tokenizer.vocab_size is {config.tokenizer.vocab_size:,}: change one of them")

    directories = {name: Path(config.data.dir) / name for name in config.corpora}
    already = all((directory / MANIFEST).exists() for directory in directories.values())
    manifests = [
        prepare_source(
            name, config.corpora[name].url, config.corpora[name].licence, directory, path,
            validation_fraction=config.data.validation_fraction, tasks=config.data.prepare_tasks, workers=_cores(),
        )
        for name, directory in directories.items()
    ]  # fmt: skip
    if already:
        print(f"{config.data.dir}: already prepared: {', '.join(directories)}")
        return
    table = Table("source", "documents", "tokens", "bytes per token", "validation tokens")
    for manifest in manifests:
        train_split, validation = (manifest["splits"][split] for split in SPLITS)
        documents, tokens, text_bytes = (train_split[key] + validation[key] for key in ("documents", "tokens", "bytes"))
        table.add_row(manifest["name"], f"{documents:,}", f"{tokens:,}", f"{text_bytes / max(tokens, 1):.2f}", f"{validation['tokens']:,}")
    Console().print(table)
