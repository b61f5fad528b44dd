"""Conversations and preference pairs -> token ids on disk, for SFT and DPO: shards and a manifest as those of corpus/prepare.py, made in one process.

A record of a conversation is its ids, uint32, with the highest bit set in those to be learned: what
the assistant says, but for messages that are not to be trained on. A pair's is the length of the
chosen side, then chosen and rejected so, in which only the answers, not what is shared before them,
are to be learned. What does not fit a row is left out, counted
and named in `left_out.txt`; a bad row stops the preparation, or with `bad_rows="skip"` is named there too.
"""

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Conversation, naming, parse_conversation, read_rows
from nanollama_jax.chat.preference import Preference, parse_preference
from nanollama_jax.console import Table, console, track
from nanollama_jax.corpus import decontaminate
from nanollama_jax.corpus.sources import about_source, is_gone, licence_of, matched_files
from nanollama_jax.data.shards import (
    MANIFEST,
    SPLITS,
    ShardWriter,
    finished,
    split_of,
    totals,
    verify_shards,
)
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked, whole_file, write_json
from nanollama_jax.tokenizer import Tokenizer

PARSERS = {"conversations": parse_conversation, "preferences": parse_preference}
SAID = np.uint32(1 << 31)
SHARD_TOKENS = 50_000_000


def prepare(
    name: str,
    url: str,
    licence: str,
    kind: str,
    bad_rows: str,
    *,
    out_dir: str | os.PathLike,
    tokenizer: Tokenizer,
    max_tokens: int,
    validation_fraction: float,
    benchmarks: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The manifest of what `url` holds, prepared into `out_dir` unless it is there. The split is by a hash of what comes before the first answer, so
    that one question is never on both sides. A row with an item of `benchmarks` (name -> URL, corpus/decontaminate.py) is left out.
    Raises BadInput for a bad row, other settings than before, or if nothing is left to train on."""
    if kind not in PARSERS or bad_rows not in ("stop", "skip"):
        raise BadInput(
            f"{name}: kind={kind!r} and bad_rows={bad_rows!r}: choose conversations or preferences, and stop or skip"
        )
    if not 0 <= validation_fraction < 1:
        raise BadInput(
            f"data.tuning_validation_fraction={validation_fraction} must be at least 0 and below 1"
        )
    out_dir = Path(out_dir)
    benchmarks = {
        benchmark: url for benchmark, url in (benchmarks or {}).items() if url
    }  # one without a URL is not searched for
    settings = dict(
        name=name,
        url=url,
        kind=kind,
        bad_rows=bad_rows,
        max_tokens=max_tokens,
        validation_fraction=validation_fraction,
    )
    settings |= {"tokenizer_sha256": tokenizer.sha256, "dtype": "uint32", "benchmarks": benchmarks}
    gone = is_gone(url) and (out_dir / MANIFEST).exists()
    settings |= {} if gone else about_source(url)
    if files := not gone and matched_files(
        url
    ):  # small enough to be read: an answer can be mended without a change of size
        settings["files_sha256"] = [
            hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files
        ]
    if manifest := finished(out_dir, settings):
        if gone:
            console.print(
                f"{name}: {url} has no files any more: {out_dir}, prepared from them, is whole and is used"
            )
        return manifest
    chat.check_tokenizer(tokenizer)
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(
        out_dir / "lock", f"{out_dir} is being prepared by another process: wait for it to end"
    ):
        writers = {split: ShardWriter(out_dir, split, SHARD_TOKENS) for split in SPLITS}
        left_out: dict[str, list[str]] = {"bad": [], "too long": [], "contaminated": []}
        index = (
            decontaminate.Index(decontaminate.read_benchmarks(benchmarks)) if benchmarks else None
        )

        def on_bad(where: str, mistake: BadInput) -> None:
            if bad_rows == "stop":
                raise BadInput(
                    f"{mistake} (tools/check_finetuning_data.py lists all bad rows; --config.tuning.{name}.bad_rows=skip leaves them out)"
                )
            left_out["bad"].append(str(mistake))

        def parse(
            record: Any, where: str
        ) -> tuple[Conversation | Preference, np.ndarray, bytes, int]:
            row = PARSERS[kind](record, where)
            return row, *_record(row, tokenizer)

        for row, record, question, length in track(
            read_rows(url, parse, on_bad), f"{name}: encoding"
        ):
            if length > max_tokens:
                left_out["too long"].append(
                    f"{row.where}: {length} tokens, where seq_len is {max_tokens}"
                )
                continue
            if index and (
                hits := index.find(
                    [
                        "\n".join(
                            text
                            for message in row.messages
                            for text in (message.thought, message.content)
                        )
                    ]
                )[0]
            ):
                left_out["contaminated"].append(
                    f"{row.where}: {hits[0].text!r} is of {hits[0].item}"
                )
                continue
            writers[split_of(question, validation_fraction)].write(
                record.tobytes(), tokens=length, text_bytes=record.nbytes
            )
        splits = {split: totals(writer.close()) for split, writer in writers.items()}
        counts = {reason: len(lines) for reason, lines in left_out.items()}
        if not splits["train"]["documents"]:
            why = ", ".join(
                f"{count} {reason}"
                for reason, count in (
                    counts | {"in validation": splits["validation"]["documents"]}
                ).items()
            )
            raise BadInput(
                f"{name}: no row of {url} is left to train on ({why}): check it, or lower data.tuning_validation_fraction"
            )
        (out_dir / "left_out.txt").write_text(
            "".join(f"{line}\n" for lines in left_out.values() for line in lines), encoding="utf-8"
        )
        manifest = settings | {
            "licence": licence or licence_of(url),
            "left_out": counts,
            "questions_too_short": index.too_short if index else {},
            "splits": splits,
        }
        verify_shards(out_dir, manifest, just_written=True)
        write_json(out_dir / MANIFEST, manifest)
    return manifest


def _record(row: Conversation | Preference, tokenizer: Tokenizer) -> tuple[np.ndarray, bytes, int]:
    """The record, what decides its split, and how many tokens must fit into one row."""
    begun = row.messages if isinstance(row, Conversation) else row.prompt
    question = repr(
        list(itertools.takewhile(lambda message: message.role != "assistant", begun))
    ).encode()
    with naming(row.where):
        if isinstance(row, Conversation):
            encoded = _encoded(row.messages, row, tokenizer)
            return encoded, question, len(encoded)
        shared = len(chat.encode(row.prompt, tokenizer, row.tools).ids)
        sides = [
            _encoded(row.prompt + answer, row, tokenizer) for answer in (row.chosen, row.rejected)
        ]
        if np.array_equal(*sides):
            raise BadInput(
                "`chosen` equals `rejected` but for whitespace: there is nothing to prefer, remove the row"
            )
    for side in sides:
        side[:shared] &= ~SAID
    return np.concatenate([[np.uint32(len(sides[0]))], *sides]), question, sum(map(len, sides))


def _encoded(
    messages: Sequence[Any], row: Conversation | Preference, tokenizer: Tokenizer
) -> np.ndarray:
    encoded = chat.encode(messages, tokenizer, row.tools)
    return encoded.ids.astype(np.uint32) | np.where(encoded.learnt, SAID, np.uint32(0))


def extend_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer at `config.tokenizer.path`, made of `config.tokenizer.base` where there is none. Raises BadInput if it is not that one's."""
    base, path = Tokenizer(config.tokenizer.base), Path(config.tokenizer.path)
    with naming(f"tokenizer.base={config.tokenizer.base}"):
        extended = base.extended()
    if not path.exists():
        with whole_file(path) as file:
            file.write(extended)
    tokenizer = Tokenizer(path)
    if tokenizer.model_bytes != extended:
        raise BadInput(
            f"tokenizer {path} is not that of {config.tokenizer.base} with the chat tokens: remove it, or set tokenizer.path"
        )
    return tokenizer


def prepare_stage(config: ConfigDict) -> None:
    """Extends the tokenizer and prepares the sources of one SFT or DPO stage, and says what it found."""
    tokenizer = extend_tokenizer(config)
    names = dict.fromkeys((*config.data.sources, *config.data.validation))
    if absent := [name for name in names if name not in config.tuning]:
        raise BadInput(
            f"data.sources has {absent[0]}, which is not in config.tuning: name its url there"
        )
    already = all((Path(config.data.dir) / name / MANIFEST).exists() for name in names)
    table = Table(
        "source",
        "rows",
        "tokens",
        "validation rows",
        "too long",
        "bad",
        "contaminated",
        title=f"{config.name}, up to {config.seq_len:,} tokens",
    )
    for name in names:
        manifest = prepare(
            name,
            **config.tuning[name],
            out_dir=Path(config.data.dir) / name,
            tokenizer=tokenizer,
            max_tokens=config.seq_len,
            validation_fraction=config.data.tuning_validation_fraction,
            benchmarks=config.data.benchmarks,
        )
        train, validation = (manifest["splits"][split] for split in SPLITS)
        left_out = {"too long": 0, "bad": 0, "contaminated": 0} | manifest[
            "left_out"
        ]  # an earlier version did not look for benchmarks
        table.add_row(
            name,
            *(
                f"{count:,}"
                for count in (
                    train["documents"],
                    train["tokens"],
                    validation["documents"],
                    *left_out.values(),
                )
            ),
        )
        if any(left_out.values()):
            console.print(
                f"{name}: {left_out} left out, named in {Path(config.data.dir) / name / 'left_out.txt'}"
            )
    if not already:
        console.print(table)
        for line in decontaminate.too_short(manifest.get("questions_too_short", {})):
            console.print(line)
