"""A prepared corpus on disk: ArrayRecord shards and `manifest.json`, which says what is in them.

A record is a tokenized document, conversation or preference pair. A document's record is its token
ids, little-endian, without BOS and EOS, in the manifest's `dtype`; data/records.py has the format
of the others. A shard is written under a temporary name and renamed when it is complete; the
manifest is written last.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from nanollama_jax.console import console, track
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
# Shard -> its checksum, and size, times and inode of its file when the checksum was compared
VERIFIED = Path("logs", "verified.json")
_WORTH_A_LINE = 2**30  # reading this many bytes takes long enough to print a line


class ShardWriter:
    """Writes records into `PREFIX-000.array_record`, `-001`, ... of at most `shard_tokens` each.

    A longer record has a shard to itself.
    """

    def __init__(self, directory: Path, prefix: str, shard_tokens: int):
        self._directory, self._prefix, self._shard_tokens = directory, prefix, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._writer = None

    def write(self, record: bytes, *, tokens: int, text_bytes: int) -> None:
        if self._writer and self._shard["tokens"] + tokens > self._shard_tokens:
            self._finish()
        if not self._writer:
            self._shard = {
                "file": f"{self._prefix}-{len(self._shards):03d}.array_record",
                "documents": 0,
                "tokens": 0,
                "bytes": 0,
            }
            self._temporary = self._directory / f"{self._shard['file']}.tmp"
            # One random read decodes a whole group.
            self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
        self._writer.write(record)
        for key, count in (("documents", 1), ("tokens", tokens), ("bytes", text_bytes)):
            self._shard[key] += count

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard. Returns the manifest's entry of each shard."""
        if self._writer:
            self._finish()
        return self._shards

    def _finish(self) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:  # it writes in the background: a full disk shows only here
            raise BadInput(
                f"shard {self._temporary} cannot be written ({error}): is the disk full?"
            ) from error
        self._writer = None
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
            self._shard |= {
                "size": os.path.getsize(self._temporary),
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
        os.replace(self._temporary, self._directory / self._shard["file"])
        self._shards.append(self._shard)


def split_of(key: bytes, validation_fraction: float) -> str:
    """The split of a record, by a hash of `key`: records with equal keys fall on the same side."""
    hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return "validation" if hashed < validation_fraction * 2**64 else "train"


def totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A split's entry in the manifest: its shards and their total counts."""
    return {
        key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")
    } | {"shards": shards}


def dtype_for(vocab_size: int) -> str:
    """The dtype that a document's ids are stored in."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def load_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises `BadInput` if it is missing or damaged."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        _check_manifest(manifest)
    except FileNotFoundError as error:
        raise BadInput(
            f"{directory} is not prepared: run python tools/prepare_data.py --config with the same "
            "config first"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"{path} is damaged ({reason}): restore it from a copy, or remove {directory} and "
            "prepare it again"
        ) from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError for a manifest that preparation did not write."""
    vocab_size = manifest.get("vocab_size") if isinstance(manifest, dict) else None
    if not isinstance(manifest["tokenizer_sha256"], str) or not isinstance(
        manifest.get("kind", ""), str
    ):
        raise ValueError("tokenizer_sha256 and kind are names")
    if manifest["dtype"] not in ("uint16", "uint32") or (
        vocab_size is not None and manifest["dtype"] != dtype_for(vocab_size)
    ):
        raise ValueError(f"dtype={manifest['dtype']!r}, vocab_size={vocab_size!r}")
    for split in SPLITS:
        counted = manifest["splits"][split]
        for shard in counted["shards"]:
            for key in ("documents", "tokens", "size"):
                if type(shard[key]) is not int or shard[key] < 0:
                    raise ValueError(f"{split}: {key}={shard[key]!r}")
            if not isinstance(shard["sha256"], str) or Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"{split}: file={shard['file']!r}, sha256={shard['sha256']!r}")
        for key in ("documents", "tokens"):
            if counted[key] != (total := sum(shard[key] for shard in counted["shards"])):
                raise ValueError(f"{split}: {key}={counted[key]!r}, but its shards have {total}")


def finished(directory: str | os.PathLike, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a corpus that is prepared already, its shards verified; None if it is not.

    Raises `BadInput` if it was prepared with other inputs, or a shard is missing or damaged.
    """
    if not (Path(directory) / MANIFEST).exists():
        return None
    manifest = load_manifest(directory)
    check_same_inputs(directory, manifest, inputs)
    verify_shards(directory, manifest)
    return manifest


def split_shards(directory: str | os.PathLike, manifest: dict[str, Any], split: str) -> list[Path]:
    """Paths of a split's shards, in order."""
    return [Path(directory) / shard["file"] for shard in manifest["splits"][split]["shards"]]


def check_same_inputs(out_dir: str | os.PathLike, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises `BadInput` that names the first input that differs, and says how to keep or redo what
    is there. `old` is the manifest of a finished corpus, or the inputs of an unfinished one."""
    finished = "splits" in old
    start_over = f"remove {out_dir}, or choose another data.dir"
    if finished:
        start_over = f"choose another data.dir (remove {out_dir} only if no run trains on it)"
    for key, value in new.items():
        had, url = old.get(key), new["url"]
        if key in ("file_sizes", "files_sha256"):
            if had in (None, value):
                continue
            if finished:
                raise BadInput(
                    f"files of {url} were changed since {out_dir} was prepared: put them back, or "
                    "move them away, to use what was prepared; to prepare what they hold now, "
                    f"{start_over}"
                )
            raise BadInput(
                f"files of {url} were changed since {out_dir} was begun: if lines were added or "
                f"removed, remove {out_dir} and prepare it again; if a line was corrected in its "
                f"place, remove {out_dir}/logs/inputs.json and rerun the command"
            )
        if key == "files" and had not in (None, value):
            raise BadInput(
                f"{out_dir} was prepared from another list of files than {url} now matches "
                f"({had['count']} then, {value['count']} now): put back the files of before to use "
                f"what is there; to prepare the new list, {start_over}"
            )
        if key == "rows_sha256" and had != value:
            raise BadInput(
                f"{out_dir} was prepared when {url} gave other rows, or that was not noted: "
                f"{start_over}"
            )
        # An earlier version had no such setting.
        if old.get(key, type(value)()) != value:
            raise BadInput(
                f"{out_dir} was prepared with {key}={had!r}, not {value!r}: set it back to use "
                f"what is there, or {start_over}"
            )


def verify_shards(
    directory: str | os.PathLike, manifest: dict[str, Any], *, just_written: bool = False
) -> None:
    """Raises `BadInput` that names the first shard that is missing or not as it was written.

    A shard is read only if its file is not known to `VERIFIED` by size, times and inode: a file
    that was copied, changed or swapped is read again. `just_written` means that the checksums in
    the manifest have just been computed from these files.
    """
    directory, looks = Path(directory), {}
    remedy = f"restore it from a copy, or remove {directory} and prepare it again"
    for shard in (shard for split in SPLITS for shard in manifest["splits"][split]["shards"]):
        path = directory / shard["file"]
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise BadInput(f"shard {path} is missing: {remedy}") from error
        if found.st_size != shard["size"]:
            raise BadInput(
                f"shard {path} has {found.st_size:,} bytes instead of {shard['size']:,}: {remedy}"
            )
        looks[shard["file"]] = [
            shard["sha256"],
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
            found.st_ino,
        ]
    known = looks if just_written else _verified(directory)
    unknown = [file for file, look in looks.items() if known.get(file) != look]
    if not unknown and not just_written:
        return
    if (total := sum(looks[file][1] for file in unknown)) > _WORTH_A_LINE:
        console.print(
            f"{directory}: comparing the checksums of {len(unknown)} shards, {total / 1e9:,.1f} "
            "GB; once, unless they change"
        )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        checksums = pool.map(_checksum, [directory / file for file in unknown])
        for file, checksum in zip(
            unknown, track(checksums, f"{directory}: verifying", len(unknown))
        ):
            if checksum != looks[file][0]:
                pool.shutdown(cancel_futures=True)
                raise BadInput(
                    f"shard {directory / file} is damaged or was replaced: its checksum differs: "
                    f"{remedy}"
                )
    try:
        write_json(directory / VERIFIED, looks)
    except OSError as error:
        console.print(
            f"{directory / VERIFIED} cannot be written ({error.strerror}): the next start compares "
            "the checksums again"
        )


def _verified(directory: Path) -> dict[str, list]:
    try:
        found = json.loads((directory / VERIFIED).read_bytes())
    except (OSError, ValueError):  # absent, or cut short when a machine went down
        return {}
    return found if isinstance(found, dict) else {}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def naming_shard(path: Path) -> Iterator[None]:
    """Turns what ArrayRecord raises for a damaged file into a `BadInput` that names the file."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(
            f"shard {path} cannot be read ({reason}): restore it from a copy, or remove "
            f"{path.parent} and prepare it again; then rerun the command: checkpoints are intact"
        ) from error
