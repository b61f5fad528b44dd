"""Raw text -> decontaminated, tokenised shards on disk (data/shards.py), with datatrove: `ReadSource` and `WriteTokens` are blocks of its pipelines.

The work is cut into a fixed number of ranks; a finished rank is not done again, so the same command goes on where a killed one stopped, and
the bytes on disk depend on neither that, nor the number of workers, nor where they ran (corpus/executor.py).
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from ml_collections import ConfigDict

from nanollama_jax.console import Table, console
from nanollama_jax.corpus import decontaminate
from nanollama_jax.corpus.executor import Executor, report_progress, run_ranks
from nanollama_jax.corpus.filters import filter_named
from nanollama_jax.corpus.near_duplicates import load_left_out
from nanollama_jax.corpus.sources import (
    about_source,
    batched,
    is_gone,
    licence_of,
    read_documents,
    useful_ranks,
)
from nanollama_jax.data.shards import (
    MANIFEST,
    SPLITS,
    ShardWriter,
    check_same_inputs,
    dtype_for,
    finished,
    split_of,
    split_shards,
    totals,
    verify_shards,
)
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked, write_json
from nanollama_jax.tokenizer import Tokenizer, train

CONTAMINATED = "contaminated_ids.json"
SHARD_TOKENS = 2**26
_SAMPLE_STREAMS = 8  # a tokenizer's sample is the beginnings of this many ranks' shares: of 8 files, where a source has as many


class ReadSource(PipelineStep):
    """Reads a source URL (corpus/sources.py), of which it leaves out what `keep` (corpus/filters.py) or the report `leave_out` says."""

    name, type = "source", "Reader"

    def __init__(self, url: str, keep: str = "", leave_out: str = ""):
        super().__init__()
        self.url, self.keep, self.leave_out = url, keep, leave_out

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        keep = filter_named(self.keep)
        left_out = load_left_out(self.leave_out, self.url) if self.leave_out else frozenset()
        for document in read_documents(self.url, rank, world_size):
            if document.id in left_out:
                self.stat_update("near_duplicates")
            elif keep(document.text):
                yield document
            else:
                self.stat_update("filtered")


class WriteTokens(PipelineStep):
    """Decontaminates and tokenises documents and writes this rank's shards, then `logs/shards/RANK.json`, which tells what is in them."""

    name, type = "tokens", "Writer"

    def __init__(
        self,
        out_dir: Path,
        tokenizer: Tokenizer,
        validation_fraction: float,
        shard_tokens: int,
        max_tokens: int = 0,
        benchmarks: Path | None = None,
        contaminated: str = "drop",
    ):
        super().__init__()
        self.out_dir, self.tokenizer = (
            Path(out_dir),
            tokenizer,
        )  # the object: a file could change while ranks run
        self.validation_fraction, self.shard_tokens, self.max_tokens = (
            validation_fraction,
            shard_tokens,
            max_tokens,
        )
        self.benchmarks, self.contaminated = benchmarks, contaminated

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        tokenizer, index = (
            self.tokenizer,
            decontaminate.load_index(self.benchmarks) if self.benchmarks else None,
        )
        dtype = np.dtype(dtype_for(tokenizer.vocab_size)).newbyteorder("<")
        writers = {
            split: ShardWriter(self.out_dir, f"{split}-{rank:05d}", self.shard_tokens)
            for split in SPLITS
        }
        max_tokens = -(-self.max_tokens // world_size) or np.inf
        counts, hits, removed = np.zeros(3, np.int64), [], Counter()
        for documents in batched(data):
            if index:
                documents, found, lost = decontaminate.clean(documents, index, self.contaminated)
                hits += found
                removed.update(lost)
            for document, ids in zip(
                documents, tokenizer.encode_batch([document.text for document in documents])
            ):
                text = document.text.encode()
                # By a hash of the text, so that equal documents never end up on both sides, or of what the source names instead.
                split_key = (
                    document.metadata["split_key"].encode()
                    if "split_key" in document.metadata
                    else text
                )
                writers[split_of(split_key, self.validation_fraction)].write(
                    np.array(ids, dtype).tobytes(), tokens=len(ids), text_bytes=len(text)
                )
                counts += (1, len(ids), len(text))
                if counts[1] >= max_tokens:
                    break
            report_progress(rank, counts.tolist())
            yield from documents
            if counts[1] >= max_tokens:
                break
        for name, count in zip(("documents", "tokens", "bytes"), counts.tolist()):
            self.stat_update(name, value=count)
        written = {split: writer.close() for split, writer in writers.items()}
        write_json(
            self.out_dir / "logs" / "shards" / f"{rank:05d}.json",
            written | {"hits": hits, "removed": removed},
        )


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
    """Prepares `url` into `out_dir` and returns its manifest; goes on from where it stopped if it was killed. None: Slurm has it now.

    `licence`, "": what is known of that of the URL. Where it is already done it compares the checksums of the shards (shards.verify_shards).
    `tasks` is the number of ranks (fewer, if the source has few files) and decides what is in which shard; each stops after its share of
    `max_tokens` (0: all there is). `keep` and `leave_out`: see `ReadSource`. `benchmarks`, name -> URL, are searched for; `contaminated` is one
    of decontaminate.POLICIES.
    Where the text of a finished corpus was deleted or moved, its shards are used as they are.
    Raises `BadInput` for bad text (what other ranks finished stays), for a source without documents or with an empty split, for Ctrl-C, and if
    `out_dir` was made with other settings, of another list of files, or of files that have been changed.
    """
    out_dir, tokenizer = Path(out_dir), Tokenizer(tokenizer_path)
    benchmarks = {
        benchmark: url for benchmark, url in (benchmarks or {}).items() if url
    }  # one without a URL is not searched for
    if not 0 <= validation_fraction < 1:
        raise BadInput(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
    if tasks < 1:
        raise BadInput(f"preparation needs at least one task, not {tasks}")
    if contaminated not in decontaminate.POLICIES:
        raise BadInput(
            f"corpora.{name}.contaminated={contaminated!r}: choose one of {', '.join(decontaminate.POLICIES)}"
        )
    filter_named(keep)
    inputs = {
        "url": url,
        "tokenizer_sha256": tokenizer.sha256,
        "validation_fraction": validation_fraction,
        "max_tokens": max_tokens,
        "keep": keep,
    }
    if leave_out:
        load_left_out(leave_out, url)  # a report that cannot be used is refused here
    inputs |= {
        "leave_out_sha256": hashlib.sha256(Path(leave_out).read_bytes()).hexdigest()
        if leave_out
        else ""
    }
    inputs |= {"benchmarks": benchmarks} | ({"contaminated": contaminated} if benchmarks else {})
    gone = is_gone(url) and (out_dir / MANIFEST).exists()
    inputs |= {} if gone else about_source(url)
    if manifest := finished(out_dir, inputs):
        if gone:
            console.print(
                f"{name}: {url} has no files any more: {out_dir}, prepared from them, is whole and is used"
            )
        return manifest
    tasks = int(min(tasks, useful_ranks(url)))

    logs = out_dir / "logs"
    (logs / "shards").mkdir(parents=True, exist_ok=True)
    with locked(
        logs / "lock", f"{out_dir} is being prepared by another process: wait for it to end"
    ):
        layout = inputs | {"tasks": tasks, "shard_tokens": shard_tokens}
        begun = (
            any((logs / "completions").glob("*")) or (logs / "slurm_job").exists()
        )  # until then a mistake in the command can be mended
        if begun and (logs / "inputs.json").exists():
            check_same_inputs(out_dir, json.loads((logs / "inputs.json").read_text()), layout)
        else:
            write_json(logs / "inputs.json", layout)
        items = logs / f"benchmarks_{decontaminate.RULE}.json" if benchmarks else None
        if items and not (begun and items.exists()):
            decontaminate.save_items(decontaminate.read_benchmarks(benchmarks), items)
        write = WriteTokens(
            out_dir, tokenizer, validation_fraction, shard_tokens, max_tokens, items, contaminated
        )
        if not run_ranks(
            [ReadSource(url, keep, leave_out), write], executor, name=name, tasks=tasks, logs=logs
        ):
            return None

        ranks = [
            json.loads((logs / "shards" / f"{rank:05d}.json").read_text()) for rank in range(tasks)
        ]
        splits = {
            split: totals([shard for rank in ranks for shard in rank[split]]) for split in SPLITS
        }
        decontamination = _decontamination(out_dir, ranks, items, contaminated)
        if not any(split["documents"] for split in splits.values()):
            raise BadInput(
                f"source {name} has no documents: {url} holds no text"
                + (" that is kept" if keep or benchmarks else "")
            )
        for split, change in (("train", "lower"), ("validation", "raise")):
            if not splits[split]["documents"] and (split == "train" or validation_fraction > 0):
                documents = sum(counts["documents"] for counts in splits.values())
                raise BadInput(
                    f"source {name} has {documents} documents and none fell into {split} at validation_fraction={validation_fraction}: "
                    f"{change} data.validation_fraction and remove {out_dir}"
                )
        manifest = {
            "name": name,
            "licence": licence or licence_of(url),
            "dtype": dtype_for(tokenizer.vocab_size),
            "vocab_size": tokenizer.vocab_size,
        }
        manifest |= inputs | {"left_out": _left_out(logs, tasks)}
        manifest |= {"decontamination": decontamination, "splits": splits}
        verify_shards(out_dir, manifest, just_written=not begun)
        write_json(out_dir / MANIFEST, manifest)
        named = {path for split in SPLITS for path in split_shards(out_dir, manifest, split)}
        for path in {
            path
            for split in SPLITS
            for path in out_dir.glob(f"{split}-[0-9]*-[0-9]*.array_record*")
        } - named:
            path.unlink()  # what ranks that were killed left
        tokens = sum(splits[split]["tokens"] for split in SPLITS)
        if tokens < max_tokens and any(
            sum(shard["tokens"] for split in SPLITS for shard in rank[split]) * tasks >= max_tokens
            for rank in ranks
        ):
            console.print(
                f"{name}: {tokens:,} tokens of {max_tokens:,}: some ranks had less than their share; with a lower data.prepare_tasks there are more"
            )
    return manifest


def _left_out(logs: Path, tasks: int) -> dict[str, int]:
    """How many documents the filter and the report of near-duplicates left out, from the ranks' stats."""
    read = [
        json.loads((logs / "stats" / f"{rank:05d}.json").read_text())[0]["stats"]
        for rank in range(tasks)
    ]
    return {
        why: sum(stats.get(why, 0) for stats in read) for why in ("filtered", "near_duplicates")
    }  # datatrove writes a count of ones as a number


def _decontamination(
    out_dir: Path, ranks: list[dict[str, Any]], items: Path | None, policy: str
) -> dict[str, Any] | None:
    """For the manifest; what was found, item by item, goes into `contaminated_ids.json`."""
    if items is None:
        return None
    hits, removed = [hit for rank in ranks for hit in rank["hits"]], Counter()
    for rank in ranks:
        removed.update(rank["removed"])
    benchmarks = decontaminate.summary(decontaminate.load_index(items), hits)
    write_json(
        out_dir / CONTAMINATED, {"policy": policy, "benchmarks": benchmarks, "contaminated": hits}
    )
    counts = {
        key: removed[key] for key in ("documents_dropped", "documents_cut", "characters_removed")
    }
    return {
        "policy": policy,
        "benchmarks": benchmarks,
        "benchmarks_sha256": hashlib.sha256(items.read_bytes()).hexdigest(),
        **counts,
    }


def train_tokenizer_for(
    urls: Sequence[str], path: str | os.PathLike, vocab_size: int, max_bytes: int
) -> None:
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


def prepare_all(config: ConfigDict, executor: Executor = Executor()) -> bool:  # noqa: B008  it is frozen
    """Trains the tokenizer if its file is missing, then prepares every corpus of `config.corpora` into `config.data.dir`/NAME.

    False where Slurm has yet to do some of it.
    """
    path = Path(config.tokenizer.path)
    if not path.exists():
        if absent := [name for name in config.tokenizer.sources if name not in config.corpora]:
            raise BadInput(
                f"tokenizer {path} is missing, and {absent[0]}, which it is trained on, is not in this config's corpora: "
                "prepare the config that has it first, or set tokenizer.path or tokenizer.sources"
            )
        console.print(
            f"training {path}: {config.tokenizer.vocab_size:,} pieces on {', '.join(config.tokenizer.sources)}"
        )
        urls = [config.corpora[name].url for name in config.tokenizer.sources]
        train_tokenizer_for(
            urls, path, config.tokenizer.vocab_size, config.tokenizer.training_bytes
        )
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != config.tokenizer.vocab_size:
        raise BadInput(
            f"tokenizer {path} has {tokenizer.vocab_size:,} pieces and tokenizer.vocab_size is {config.tokenizer.vocab_size:,}: change one of them"
        )
    for name, reason in tokenizer.not_exportable.items():
        console.print(
            f"warning: no model trained with {path} can be exported as {name}: the tokenizer {reason}"
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
        return True
    table = Table("source", "documents", "tokens", "bytes per token", "validation", "contaminated")
    for manifest in manifests:
        train_split, validation = (manifest["splits"][split] for split in SPLITS)
        documents, tokens, text_bytes = (
            train_split[key] + validation[key] for key in ("documents", "tokens", "bytes")
        )
        table.add_row(
            manifest["name"],
            f"{documents:,}",
            f"{tokens:,}",
            f"{text_bytes / max(tokens, 1):.2f}",
            f"{validation['tokens']:,}",
            _contaminated(manifest),
        )
    console.print(table)
    searched = [
        manifest["decontamination"]["benchmarks"]
        for manifest in manifests
        if manifest.get("decontamination")
    ]
    counts = {
        name: found.get("too_short", 0)
        for benchmarks in searched
        for name, found in benchmarks.items()
    }
    for line in decontaminate.too_short(counts):
        console.print(line)
    return True


def _contaminated(manifest: dict[str, Any]) -> str:
    if not (found := manifest.get("decontamination")):
        return "not searched"
    return f"{found['documents_dropped'] + found['documents_cut']:,}"
