"""Estimates what preparing a recipe's corpora takes: documents, text, tokens, disk and hours.

A sample of each source gives the size of documents, the share that is kept and the speed of
tokenization. The amount of text comes from the sizes of all files (local or on the hub) and from
how much text a stored byte holds in three of them. Nothing is written.
"""

import dataclasses
import itertools
import lzma
import time
import zlib
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict

from nanollama_jax.console import Table, console
from nanollama_jax.corpus import formats, sources
from nanollama_jax.corpus.executor import cores
from nanollama_jax.corpus.filters import filter_named
from nanollama_jax.data.shards import MANIFEST, SPLITS, load_manifest
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

SAMPLE_BYTES, SAMPLE_SECONDS = 4_000_000, 60.0  # whichever comes first
_LOOK_BYTES = 8_000_000  # of a file that is looked into
_STREAMS = 8  # the sample is the beginnings of this many ranks' shares
# Bytes per token, and bytes per second and core, if there is no tokenizer yet: measured on novels
# with Mistral's 32,000 pieces (docs/data.md)
_UNTRAINED = (4.1, 2e6)
# Bytes per token and per document on disk: measured 1.0 to 1.3 per token for prose and code of 1,000
# tokens and more, and 3.0 for documents of 80 tokens
_DISK = (1.3, 150)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One corpus: `text_bytes` are read, `documents` and `tokens` are written, in `hours` on the
    cores of this machine."""

    documents: float
    text_bytes: float
    tokens: float
    disk_bytes: float
    hours: float
    note: str


def estimate(
    url: str, tokenizer: Tokenizer | None, *, max_tokens: int = 0, keep: str = ""
) -> Estimate:
    """Reads a sample of `url` and scales it to the whole source, or to `max_tokens` if that is less.

    Raises `BadInput` for a source that cannot be read.
    """
    kept, read, kept_bytes, is_kept = 0, 0, 0, filter_named(keep)
    started, texts = time.monotonic(), []
    streams = [sources.read_documents(url, rank, _STREAMS) for rank in range(_STREAMS)]
    for document in itertools.chain.from_iterable(itertools.zip_longest(*streams)):
        if document is not None:
            read += len(document.text.encode())
            if is_kept(document.text):
                texts.append(document.text)
                kept, kept_bytes = kept + 1, kept_bytes + len(document.text.encode())
            if read >= SAMPLE_BYTES or time.monotonic() - started > SAMPLE_SECONDS:
                break
    else:
        total_bytes, note = float(read), "read whole"
    if read >= SAMPLE_BYTES or time.monotonic() - started > SAMPLE_SECONDS:
        total_bytes, note = text_bytes(url), ""
    if tokenizer:
        tokens, seconds = sum(map(len, tokenizer.encode_batch(texts))), time.monotonic() - started
    else:
        tokens = kept_bytes / _UNTRAINED[0]
        seconds = time.monotonic() - started + kept_bytes / _UNTRAINED[1]
    all_tokens = tokens * total_bytes / max(read, 1) if total_bytes else max_tokens
    wanted = min(all_tokens, max_tokens or all_tokens)
    scale = wanted / max(tokens, 1)
    if not total_bytes:
        note = (
            "size unknown: as much as is asked for"
            if max_tokens
            else "size unknown: the sample alone"
        )
        scale = scale or 1.0
    elif max_tokens and all_tokens < max_tokens:
        note = f"all there is, of {max_tokens:,} tokens asked for"
    if keep:
        note = f"{kept_bytes / max(read, 1):.0%} kept by filter {keep!r}" + (
            f"; {note}" if note else ""
        )
    disk = scale * (_DISK[0] * tokens + _DISK[1] * kept)
    return Estimate(
        scale * kept, scale * read, scale * tokens, disk, scale * seconds / cores() / 3600, note
    )


def text_bytes(url: str) -> float | None:
    """About how much text a source of files has; None if that cannot be told from its files."""
    if (found := sources.stored_files(url)) is None or not all(
        formats.is_readable(file) for file in found[0]
    ):
        return None
    files, field = found
    sizes, at = (
        [fsspec.core.url_to_fs(file)[0].size(file) for file in files],
        sorted({0, len(files) // 2, len(files) - 1}),
    )
    return (
        sum(sizes)
        * sum(_text_in(files[i], field, sizes[i]) for i in at)
        / max(1, sum(sizes[i] for i in at))
    )


def _text_in(path: str, field: str, size: int) -> float:
    """From the footer of a Parquet file; from the first megabytes of others."""
    try:
        with fsspec.open(path, "rb") as file:
            if path.endswith(".parquet"):
                metadata = pyarrow.parquet.ParquetFile(file).metadata
                groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
                columns = (group.column(i) for group in groups for i in range(group.num_columns))
                return sum(
                    column.total_uncompressed_size
                    for column in columns
                    if column.path_in_schema == field
                )
            content = formats.unpacked(file, path).read(_LOOK_BYTES)
            stored = size if len(content) < _LOOK_BYTES else min(file.tell(), size)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
        raise BadInput(f"{path} cannot be read, or is cut off: {error}") from error
    if path.endswith(".txt"):
        return len(content) * size / max(1, stored)
    whole = (
        content if stored == size else content[: content.rfind(b"\n") + 1]
    )  # the last line may be cut
    if not whole:
        return len(content) * size / max(1, stored)
    texts = (
        _text(line, field, f"{path}:{number}")
        for number, line in enumerate(whole.split(b"\n"), 1)
        if line.strip()
    )
    return (
        sum(len(text.encode(errors="surrogatepass")) for text in texts)
        * size
        / max(1, stored)
        * len(content)
        / len(whole)
    )


def _text(line: bytes, field: str, where: str) -> str:
    record = formats.json_object(line, where)
    if isinstance(record, BadInput):
        raise record
    return formats.text_of(record, field, where)


def print_estimates(config: ConfigDict) -> None:
    """Prints a table of what preparing `config.corpora` takes, or took if it is prepared already."""
    path = Path(config.tokenizer.path)
    tokenizer = Tokenizer(path) if path.exists() else None
    table = Table(
        "source",
        "documents",
        "text",
        "tokens",
        "disk",
        "hours",
        title=f"{config.data.dir}, on {cores()} cores",
    )
    total, notes = [0.0] * 5, []
    for name, corpus in config.corpora.items():
        directory = Path(config.data.dir) / name
        if (directory / MANIFEST).exists():
            splits = load_manifest(directory)["splits"]
            documents, text_bytes, tokens = (
                sum(splits[split][key] for split in SPLITS)
                for key in ("documents", "bytes", "tokens")
            )
            disk = sum(shard["size"] for split in SPLITS for shard in splits[split]["shards"])
            figures = Estimate(documents, text_bytes, tokens, disk, 0.0, "prepared already")
        else:
            figures = estimate(
                corpus.url,
                tokenizer,
                max_tokens=corpus.get("max_tokens", 0),
                keep=corpus.get("keep", ""),
            )
        total = [sum(pair) for pair in zip(total, dataclasses.astuple(figures))]
        table.add_row(name, *_cells(*dataclasses.astuple(figures)[:5]))
        notes += [f"{name}: {figures.note}"] if figures.note else []
    if len(config.corpora) > 1:
        table.add_section()
        table.add_row("all", *_cells(*total))
    console.print(table)
    console.print("\n".join(notes))
    if tokenizer is None:
        console.print(
            f"There is no tokenizer yet: assuming {_UNTRAINED[0]} bytes per token and "
            f"{_UNTRAINED[1] / 1e6:.0f} MB/s per core."
        )
    console.print(
        "Not included: downloads, and the search for benchmarks (a tenth of the hours, or less)."
    )


def _cells(documents: float, text: float, tokens: float, disk: float, hours: float) -> list[str]:
    return [
        f"{documents:,.0f}",
        f"{_short(text)}B",
        _short(tokens),
        f"{_short(disk)}B",
        f"{hours:,.2f}",
    ]


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
