"""Conversations and preference pairs -> token ids on disk, for SFT and DPO.

data/records.py has the record format. A row that does not fit into a training row is left out,
counted, and named in `left_out.txt`. A bad row stops the preparation, or with `bad_rows="skip"` is
left out and named too.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Conversation, Message, naming, parse_conversation
from nanollama_jax.chat.preference import Preference, parse_preference
from nanollama_jax.console import Table, console
from nanollama_jax.corpus import decontaminate, preparer
from nanollama_jax.corpus.executor import report_progress
from nanollama_jax.corpus.preparer import LeftOut, Prepared, Record
from nanollama_jax.corpus.rows import read_rows
from nanollama_jax.corpus.sources import about_source, is_gone, licence_of, matched_files
from nanollama_jax.data.records import SAID, encode, encode_pair
from nanollama_jax.data.shards import MANIFEST, SPLITS
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file
from nanollama_jax.tokenizer import Tokenizer

PARSERS = {"conversations": parse_conversation, "preferences": parse_preference}
SHARD_TOKENS = 50_000_000
_REASONS = ("bad", "too long", "contaminated")
_REPORT_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Rows:
    """The conversations or pairs of a source; see `prepare` for the fields."""

    name: str
    url: str
    licence: str
    kind: str
    bad_rows: str
    tokenizer: Tokenizer
    max_tokens: int
    validation_fraction: float
    benchmarks: dict[str, str]
    numbered: bool = dataclasses.field(default=False, init=False)

    def inputs(self) -> dict[str, Any]:
        inputs = {
            "name": self.name,
            "url": self.url,
            "kind": self.kind,
            "bad_rows": self.bad_rows,
            "max_tokens": self.max_tokens,
            "validation_fraction": self.validation_fraction,
            "tokenizer_sha256": self.tokenizer.sha256,
            "dtype": "uint32",
            "benchmarks": self.benchmarks,
        }
        if is_gone(self.url):
            return inputs
        inputs |= about_source(self.url)
        # These files are small, and an answer can be corrected without a change of size.
        if files := matched_files(self.url):
            inputs["files_sha256"] = [
                hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files
            ]
        return inputs

    def records(
        self, rank: int, ranks: int, index: decontaminate.Index | None
    ) -> Iterator[Record | LeftOut]:
        chat.check_tokenizer(self.tokenizer)
        bad: list[LeftOut] = []

        def on_bad(where: str, mistake: BadInput) -> None:
            if self.bad_rows == "stop":
                raise BadInput(
                    f"{mistake} (tools/check_finetuning_data.py lists all bad rows; "
                    f"--config.tuning.{self.name}.bad_rows=skip leaves them out)"
                )
            bad.append(LeftOut("bad", detail=str(mistake)))

        def parse(record: Any, where: str) -> tuple[Conversation | Preference, Record]:
            row = PARSERS[self.kind](record, where)
            encoded, question, length = _record(row, self.tokenizer)
            return row, Record(encoded.tobytes(), question, length, encoded.nbytes)

        counts = np.zeros(3, np.int64)
        for row, record in read_rows(self.url, parse, on_bad):
            yield self._left_out(row, record.tokens, index) or record
            counts += (1, record.tokens, record.text_bytes)
            if counts[0] % _REPORT_ROWS == 0:
                report_progress(rank, counts.tolist())
        yield from bad

    def _left_out(
        self, row: Conversation | Preference, length: int, index: decontaminate.Index | None
    ) -> LeftOut | None:
        if length > self.max_tokens:
            detail = f"{row.where}: {length} tokens, where seq_len is {self.max_tokens}"
            return LeftOut("too long", detail=detail)
        texts = (text for message in row.messages for text in (message.thought, message.content))
        if index and (hits := index.find(["\n".join(texts)])[0]):
            detail = f"{row.where}: {hits[0].text!r} is of {hits[0].item}"
            return LeftOut("contaminated", detail=detail)
        return None

    def manifest(self, inputs: dict[str, Any], done: Prepared) -> dict[str, Any]:
        counts = {reason: done.left_out[reason] for reason in _REASONS}
        if not done.splits["train"]["documents"]:
            found = counts | {"in validation": done.splits["validation"]["documents"]}
            why = ", ".join(f"{count} {reason}" for reason, count in found.items())
            raise BadInput(
                f"{self.name}: no row of {self.url} is left to train on ({why}): check it, or "
                "lower data.tuning_validation_fraction"
            )
        lines = [line for reason in _REASONS for line in done.details.get(reason, [])]
        report = "".join(f"{line}\n" for line in lines)
        (done.out_dir / "left_out.txt").write_text(report, encoding="utf-8")
        too_short = decontaminate.load_index(done.items).too_short if done.items else {}
        return inputs | {
            "licence": self.licence or licence_of(self.url),
            "left_out": counts,
            "questions_too_short": too_short,
            "splits": done.splits,
        }


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
    """Prepares the rows of `url` into `out_dir`, unless they are there, and returns the manifest.

    `kind` is "conversations" or "preferences", `bad_rows` "stop" or "skip"; `max_tokens` is the
    longest row that is kept. The split is by a hash of what comes before the first answer, so that
    a question never falls on both sides. A row that holds an item of `benchmarks`, name -> URL
    (corpus/decontaminate.py), is left out. Raises `BadInput` for a bad row, for other settings than
    before, and if nothing is left to train on.
    """
    if kind not in PARSERS or bad_rows not in ("stop", "skip"):
        raise BadInput(
            f"{name}: kind={kind!r} and bad_rows={bad_rows!r}: choose conversations or "
            "preferences, and stop or skip"
        )
    if not 0 <= validation_fraction < 1:
        raise BadInput(
            f"data.tuning_validation_fraction={validation_fraction} must be at least 0 and below 1"
        )
    benchmarks = decontaminate.with_url(benchmarks)
    rows = Rows(
        name=name,
        url=url,
        licence=licence,
        kind=kind,
        bad_rows=bad_rows,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        validation_fraction=validation_fraction,
        benchmarks=benchmarks,
    )
    return preparer.prepare(
        rows,
        Path(out_dir),
        validation_fraction=validation_fraction,
        shard_tokens=SHARD_TOKENS,
        benchmarks=benchmarks,
    )


def _record(row: Conversation | Preference, tokenizer: Tokenizer) -> tuple[np.ndarray, bytes, int]:
    """The record, what decides its split, and how many tokens must fit into one training row."""
    begun = row.messages if isinstance(row, Conversation) else row.prompt
    question = itertools.takewhile(lambda message: message.role != "assistant", begun)
    split_key = repr(list(question)).encode()
    with naming(row.where):
        if isinstance(row, Conversation):
            encoded = _encoded(row.messages, row, tokenizer)
            return encoded, split_key, len(encoded)
        shared = len(chat.encode(row.prompt, tokenizer, row.tools).ids)
        chosen, rejected = (
            _encoded(row.prompt + answer, row, tokenizer) for answer in (row.chosen, row.rejected)
        )
        if np.array_equal(chosen, rejected):
            raise BadInput(
                "`chosen` equals `rejected` but for whitespace: there is nothing to prefer, "
                "remove the row"
            )
    for side in (chosen, rejected):
        side[:shared] &= ~SAID
    return encode_pair(chosen, rejected), split_key, len(chosen) + len(rejected)


def _encoded(
    messages: Sequence[Message], row: Conversation | Preference, tokenizer: Tokenizer
) -> np.ndarray:
    encoded = chat.encode(messages, tokenizer, row.tools)
    return encode(encoded.ids, encoded.learned)


def extend_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer at `config.tokenizer.path`, made from `config.tokenizer.base` if it is missing.

    Raises `BadInput` if the file is not the base tokenizer with the chat tokens.
    """
    base, path = Tokenizer(config.tokenizer.base), Path(config.tokenizer.path)
    with naming(f"tokenizer.base={config.tokenizer.base}"):
        extended = base.extended()
    if not path.exists():
        with whole_file(path) as file:
            file.write(extended)
    tokenizer = Tokenizer(path)
    if tokenizer.model_bytes != extended:
        raise BadInput(
            f"tokenizer {path} is not that of {config.tokenizer.base} with the chat tokens: "
            "remove it, or set tokenizer.path"
        )
    return tokenizer


def prepare_stage(config: ConfigDict) -> None:
    """Extends the tokenizer, prepares the sources of one SFT or DPO stage, and prints a summary."""
    tokenizer = extend_tokenizer(config)
    names = dict.fromkeys((*config.data.sources, *config.data.validation))
    if absent := [name for name in names if name not in config.tuning]:
        raise BadInput(
            f"data.sources has {absent[0]}, which is not in config.tuning: name its url there"
        )
    directories = {name: Path(config.data.dir) / name for name in names}
    already = all((directory / MANIFEST).exists() for directory in directories.values())
    columns = ("source", "rows", "tokens", "validation rows", *("too long", "bad", "contaminated"))
    table = Table(*columns, title=f"{config.name}, up to {config.seq_len:,} tokens")
    for name, directory in directories.items():
        manifest = prepare(
            name,
            **config.tuning[name],
            out_dir=directory,
            tokenizer=tokenizer,
            max_tokens=config.seq_len,
            validation_fraction=config.data.tuning_validation_fraction,
            benchmarks=config.data.benchmarks,
        )
        train, validation = (manifest["splits"][split] for split in SPLITS)
        # An earlier version did not look for benchmarks.
        left_out = {"too long": 0, "bad": 0, "contaminated": 0} | manifest["left_out"]
        counts = train["documents"], train["tokens"], validation["documents"], *left_out.values()
        table.add_row(name, *(f"{count:,}" for count in counts))
        if any(left_out.values()):
            console.print(f"{name}: left out {left_out}, named in {directory / 'left_out.txt'}")
    if not already:
        console.print(table)
        for line in decontaminate.too_short(manifest.get("questions_too_short", {})):
            console.print(line)
