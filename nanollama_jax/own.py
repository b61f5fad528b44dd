"""Trains on any text in one command: tokenizer, preparation, steps, checkpoint.

Everything that the text decides is derived here: the size of the vocabulary, the validation split,
the number of steps and the schedule. Rerunning resumes; text that changed is refused.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
from ml_collections import ConfigDict

from nanollama_jax import checkpoint, recipes
from nanollama_jax.config import check, check_workdir
from nanollama_jax.config.settings import OwnText
from nanollama_jax.console import console
from nanollama_jax.corpus.prepare import prepare_all, train_tokenizer_for
from nanollama_jax.corpus.sources import about_source, is_gone, read_documents
from nanollama_jax.data.shards import load_manifest, split_of
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file, write_json
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.loop import Outcome, train

NAME = "text"  # of the corpus
MIN_STEPS = 100
BYTES_PER_PIECE = 256  # of text, for each piece of the vocabulary, where the text is small
MIN_PIECES = 512
FEW_DOCUMENTS = 64  # fewer are cut into pieces, so that some can be kept for validation
SAMPLE_BYTES = 2**24  # enough to fill the largest vocabulary
VALIDATION_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)  # tried after the recipe's
BYTES_PER_TASK = 2**22


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of the text before it is prepared, kept in `text.json` beside it."""

    url: str
    source: dict[str, Any]  # corpus.sources.about_source: the files and their sizes
    prepared_url: str  # the same, or the pieces that few documents were cut into
    sha256: str  # of the text, where it was cut; else ""
    vocab_size: int  # to train
    least_vocab_size: int
    validation_fraction: float
    tasks: int


def train_on_text(
    text: str,
    size: str = "nano",
    workdir: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains a model on `text`: a path, a glob or a source URL.

    Args:
      size: one of `recipes.MODELS`.
      workdir: for checkpoints and logs; None: a folder in `runs` named after the text.
      settings: values of configs/own.py to override, by dotted name: {"epochs": 4.0}.

    Raises BadInput for text that cannot be read or changed since it was prepared, and whatever
    `train` raises.
    """
    config = recipes.own(size)
    config.text = text
    config.update_from_flattened_dict(dict(settings or {}))
    return run(config, default_workdir(config) if workdir is None else workdir)


def run(config: ConfigDict, workdir: str | os.PathLike) -> Outcome:
    """Prepares and trains what a config of `recipes.own` describes; says where the result lies."""
    check(config)
    check_workdir(workdir)
    stage = prepare(config)
    outcome = train(stage, workdir)
    if outcome.finished:
        folder = pathlib.Path(workdir) / checkpoint.FOLDER / f"step_{outcome.step}"
        _say(f"Checkpoint: {folder}")
        _say(f"Generate:   python tools/generate.py --checkpoint {shlex.quote(str(workdir))}")
    return outcome


def _say(line: str) -> None:
    if jax.process_index() == 0:
        console.print(line)


def default_workdir(config: ConfigDict) -> str:
    return os.path.join("runs", f"own_{folder_name(config)}")


def folder_name(config: ConfigDict) -> str:
    """Of what is prepared: the text's name, a hash of its place, and the scale."""
    url = url_of(config.text)
    parts = re.split(r"[/?]", url.partition("://")[2])
    plain = [part for part in parts if part.strip(".") and not set("*?[=") & set(part)]
    stem = re.sub(r"[^\w-]+", "_", plain[-1].split(".")[0])[:40] if plain else ""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return f"{stem or NAME}_{digest}_{config.scale}"


def url_of(text: str) -> str:
    """A source URL: `text` itself, or that of a path or glob, made absolute."""
    return text if "://" in text else f"file://{os.path.abspath(os.path.expanduser(text))}"


def prepare(config: ConfigDict) -> ConfigDict:
    """Prepares the text, if that is not done, and returns the config of the stage to train."""
    folder, url = pathlib.Path(config.data.dir) / folder_name(config), url_of(config.text)
    kept = folder / "text.json"
    if jax.process_count() > 1 and not (folder / NAME / "manifest.json").exists():
        raise BadInput(
            f"{config.text} is not prepared in {folder}: with several processes, start with one, "
            "and interrupt it when it trains"
        )
    if kept.exists():
        survey = Survey(**json.loads(kept.read_text()))
        check_unchanged(survey, folder)
    else:
        survey = look_at(url, config, folder)
        write_json(kept, dataclasses.asdict(survey))
    stage = _stage_to_prepare(config, survey, folder)
    _train_tokenizer(stage, survey)
    if not any(config.data.benchmarks.values()):
        _say(
            f"{config.text}: not searched for benchmarks; name some to do so: "
            "--config.data.benchmarks.NAME=URL"
        )
    if jax.process_count() == 1:
        prepare_all(stage)
    with stage.unlocked():
        _set_length(stage, config, folder)
    return stage


def look_at(url: str, config: ConfigDict, folder: pathlib.Path) -> Survey:
    """Reads the beginning of the text, or all of it if it is a few documents. These it cuts into
    pieces: a document is either trained on or validated on, and a single book must do for both."""
    fractions = [config.data.validation_fraction]
    fractions += [fraction for fraction in VALIDATION_FRACTIONS if fraction > fractions[0]]
    found, prepared_url, tasks = measure(texts_of(url), fractions), url, config.data.prepare_tasks
    sha256 = ""
    if found.documents < FEW_DOCUMENTS:
        sha256, prepared_url = found.sha256, f"file://{folder.absolute() / 'pieces.jsonl'}"
        length = min(max(found.characters // FEW_DOCUMENTS, 1000), 100_000)
        pieces = (piece for text in texts_of(url) for piece in cut(text, length))
        with whole_file(folder / "pieces.jsonl") as file:
            found = measure(_written(pieces, file), fractions, everything=True)
        tasks = min(tasks, 1 + found.bytes // BYTES_PER_TASK)
    wanted = max(1, min(4, found.documents // 10))
    enough = [f for f in fractions if wanted <= found.validation[f] < found.documents]
    if not enough:
        raise BadInput(
            f"{config.text} has {found.characters:,} characters in {found.documents} documents: "
            "too little to train on a part and validate on the rest"
        )
    vocab_size = max(MIN_PIECES, found.bytes // BYTES_PER_PIECE, _least_pieces(found)) // 8 * 8
    return Survey(
        url=url,
        source=about_source(url),
        prepared_url=prepared_url,
        sha256=sha256,
        vocab_size=min(vocab_size, recipes.MODELS[config.scale]["vocab_size"]),
        least_vocab_size=_least_pieces(found),
        validation_fraction=enough[0],
        tasks=tasks,
    )


@dataclasses.dataclass
class Measure:
    """Counts of the documents that were read."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    alphabet: set[str] = dataclasses.field(default_factory=set)
    validation: Counter[float] = dataclasses.field(default_factory=Counter)  # by fraction
    sha256: str = ""


def measure(
    texts: Iterable[str], fractions: Iterable[float], *, everything: bool = False
) -> Measure:
    """Counts documents, and how many each fraction would keep for validation, in the first
    SAMPLE_BYTES and FEW_DOCUMENTS or in everything."""
    found, digest = Measure(), hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(data + b"\0")
        found.documents += 1
        found.characters += len(text)
        found.bytes += len(data)
        found.alphabet.update(text)
        found.validation.update(f for f in fractions if split_of(data, f) == "validation")
        if not everything and found.documents >= FEW_DOCUMENTS and found.bytes >= SAMPLE_BYTES:
            break
    found.sha256 = digest.hexdigest()
    return found


def texts_of(url: str) -> Iterator[str]:
    return (document.text for document in read_documents(url, 0, 1))


def cut(text: str, length: int) -> Iterator[str]:
    """Pieces of at most `length` characters, which end after a paragraph, a line or a word, where
    one ends in the second half. Joined they are `text`."""
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            for gap in ("\n\n", "\n", " "):
                at = text.rfind(gap, start + length // 2, end)
                if at >= 0:
                    end = at + len(gap)
                    break
        yield text[start:end]
        start = end


def _written(pieces: Iterable[str], file: BinaryIO) -> Iterator[str]:
    """The pieces that are not blank, each written as a line of JSON."""
    for piece in pieces:
        if not piece.isspace():
            file.write(json.dumps({"text": piece}).encode() + b"\n")
            yield piece


def _least_pieces(found: Measure) -> int:
    """Of a vocabulary: 256 bytes, 3 control pieces, every character, and a few pairs."""
    return 259 + len(found.alphabet) + 16


def check_unchanged(survey: Survey, folder: pathlib.Path) -> None:
    """Raises BadInput if the text is not the one that was prepared; text that is gone is."""
    if is_gone(survey.url):
        return
    changed = about_source(survey.url) != survey.source
    if survey.sha256 and not changed:
        changed = measure(texts_of(survey.url), (), everything=True).sha256 != survey.sha256
    if changed:
        raise BadInput(
            f"{survey.url} changed since it was prepared in {folder}: put it back to resume; to "
            "train on what it is now, choose another data.dir and another --workdir"
        )


def _stage_to_prepare(config: ConfigDict, survey: Survey, folder: pathlib.Path) -> ConfigDict:
    """The config of the stage, but for its length."""
    own = [field.name for field in dataclasses.fields(OwnText)]
    stage = ConfigDict({key: value for key, value in config.to_dict().items() if key not in own})
    stage.corpora[NAME].url = survey.prepared_url
    stage.data.update(
        dict(
            dir=str(folder),
            validation_fraction=survey.validation_fraction,
            prepare_tasks=survey.tasks,
        )
    )
    if stage.tokenizer.path == "auto":
        stage.tokenizer.path = str(folder / "tokenizer.model")
    return stage


def _train_tokenizer(stage: ConfigDict, survey: Survey) -> None:
    """Trains the tokenizer if it is missing, and sets the vocabulary's size. Text that repeats
    itself fills fewer pieces than its size promises: a smaller vocabulary is tried then."""
    path = stage.tokenizer.path
    size = stage.model.vocab_size or survey.vocab_size
    while not os.path.exists(path):
        _say(f"training {path}: {size:,} pieces")
        try:
            train_tokenizer_for([survey.prepared_url], path, size, stage.tokenizer.training_bytes)
        except BadInput:
            if stage.model.vocab_size or size <= survey.least_vocab_size:
                raise
            size = max(size // 2 // 8 * 8, survey.least_vocab_size)
    if not stage.model.vocab_size:
        stage.model.vocab_size = stage.tokenizer.vocab_size = Tokenizer(path).vocab_size


def _set_length(stage: ConfigDict, config: ConfigDict, folder: pathlib.Path) -> None:
    """Steps and schedule, from the tokens at hand and the epochs asked for."""
    train_split = load_manifest(folder / NAME)["splits"]["train"]
    tokens = train_split["tokens"] + 2 * train_split["documents"]  # with BOS and EOS
    asked = round(config.epochs * tokens / stage.tokens_per_step)
    steps = max(MIN_STEPS, asked)
    stage.end_step = steps
    decay_start = steps - round(config.decay_fraction * steps)
    stage.schedule = ConfigDict(
        dict(
            warmup_steps=min(round(config.warmup_fraction * steps), decay_start),
            decay_start=decay_start,
            total_steps=steps,
        )
    )
    stage.validation.every = min(stage.validation.every, max(1, steps // 5))
    epochs = steps * stage.tokens_per_step / tokens
    why = "" if steps == asked else f", not the {asked} of {config.epochs:g}: at least {MIN_STEPS}"
    _say(
        f"{config.text}: {tokens:,} tokens to train on, {stage.model.vocab_size:,} in the "
        f"vocabulary; {steps:,} steps of {stage.tokens_per_step:,} tokens are {epochs:.2f} epochs"
        f"{why}"
    )
