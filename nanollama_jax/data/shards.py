"""A prepared corpus on disk: ArrayRecord shards of one tokenised document, conversation or pair a record, and `manifest.json`, written last, that
says what is in them.

A document's record is token ids, raw little-endian, without BOS and EOS; data/finetuning.py has the others'. A shard is written under a temporary
name and renamed when whole.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from datatrove.data import Document

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
_RECORDS = 256  # read at once


class ShardWriter:
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


def split_of(key: bytes, validation_fraction: float) -> str:
    """The split of a document or row, by a hash of `key`: what has the same key is on the same side."""
    hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return "validation" if hashed < validation_fraction * 2**64 else "train"


def totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest says of a split: its shards, and their counts together."""
    return {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")} | {"shards": shards}


def load_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises `BadInput` if there is none."""
    path = Path(directory) / MANIFEST
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadInput(f"{directory} is not prepared: run python tools/prepare_data.py --config with the same config first") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is damaged ({error}): remove {directory} and prepare it again") from error


def finished(directory: str | os.PathLike, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a corpus that is there whole. Raises `BadInput` if it was made with other inputs, or a shard is missing or damaged."""
    if not (Path(directory) / MANIFEST).exists():
        return None
    manifest = load_manifest(directory)
    check_same_inputs(directory, manifest, inputs)
    verify_shards(directory, manifest, checksums=True)
    return manifest


def split_shards(directory: str | os.PathLike, manifest: dict[str, Any], split: str) -> list[Path]:
    """Paths of a split's shards, in order."""
    return [Path(directory) / shard["file"] for shard in manifest["splits"][split]["shards"]]


def read_documents(directory: str | os.PathLike, tokenizer: Tokenizer) -> Iterator[Document]:
    """The text of a prepared corpus, in the order of its shards; ids are SHARD:RECORD. Raises `BadInput` as `load_manifest` does."""
    directory, manifest = Path(directory), load_manifest(directory)
    if kind := manifest.get("kind"):
        raise BadInput(f"{directory} holds {kind}: name a corpus of documents")
    if manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise BadInput(f"{directory} was tokenised with another tokenizer (sha256 {manifest['tokenizer_sha256'][:12]}): name that one")
    verify_shards(directory, manifest)
    for split in SPLITS:
        for path in split_shards(directory, manifest, split):
            reader = ArrayRecordReader(str(path))
            for start in range(0, reader.num_records(), _RECORDS):
                for number, record in enumerate(reader.read(start, min(start + _RECORDS, reader.num_records())), start):
                    yield Document(text=tokenizer.decode(np.frombuffer(record, manifest["dtype"]).tolist()), id=f"{path}:{number + 1}")


def check_same_inputs(out_dir: str | os.PathLike, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises `BadInput` that names what a corpus was made of or with, where that is not the same now."""
    for key, value in new.items():
        if key in ("file_sizes", "files_sha256"):
            if old.get(key, value) != value:
                mended = f"; if a line was mended in its place, remove {out_dir}/logs/inputs.json and run the same command"
                raise BadInput(
                    f"files of {new['url']} were changed since {out_dir} was begun: if lines were added or removed, remove {out_dir} and prepare "
                    f"it again{'' if 'splits' in old else mended}"
                )
            continue
        if key == "files" and old.get(key, value) != value:
            raise BadInput(
                f"{out_dir} was prepared from another list of files than {new['url']} now matches ({old[key]['count']} then, "
                f"{value['count']} now): remove {out_dir} and prepare it again, or choose another data.dir"
            )
        if key == "rows_sha256" and old.get(key) != value:
            raise BadInput(f"{out_dir} was prepared when {new['url']} gave other rows, or that was not noted: remove it, or choose another data.dir")
        if old.get(key, type(value)()) != value:  # a corpus of before there was such a setting had none
            raise BadInput(f"{out_dir} was prepared with {key}={old.get(key)!r}, not {value!r}: remove it, or choose another data.dir")


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
