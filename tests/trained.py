"""A small trained model of nano's widths, made by the real loop, for tests of generation and exports.

Random weights would do for most of these tests, but their probabilities are nearly uniform:
quantisation errors hide in them, and greedy choices are ties.
"""

import fcntl
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable

import pytest
from ml_collections import ConfigDict

from nanollama_jax import checkpoint
from nanollama_jax.corpus.prepare import prepare_source, train_tokenizer_for
from nanollama_jax.recipes import phase, recipe
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.loop import train

VOCAB = 1024
STEPS = 60


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> pathlib.Path:
    """Its workdir."""
    return once(tmp_path_factory, "trained", _make) / "run"


@pytest.fixture(scope="session")
def chat_tokenizer(trained) -> Tokenizer:
    """Its tokenizer, with the chat tokens."""
    return Tokenizer("chat", checkpoint.load(trained).tokenizer.extended())


def once(tmp_path_factory, name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """A folder that `make` fills once; with several test workers, the first fills it for all."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folder = root / name
    folder.mkdir(exist_ok=True)
    with root.joinpath(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.joinpath(f"{name}.done").exists():
            make(folder)
            root.joinpath(f"{name}.done").touch()
    return folder


def _make(folder: pathlib.Path) -> None:
    modules = (
        "argparse",
        "ast",
        "collections",
        "dataclasses",
        "enum",
        "inspect",
        "json.decoder",
        "logging",
        "pathlib",
        "pdb",
        "tarfile",
        "typing",
    )
    texts = [pathlib.Path(importlib.util.find_spec(name).origin).read_text() for name in modules]
    source = f"file://{folder}/code.jsonl"
    (folder / "code.jsonl").write_text(
        "".join(
            json.dumps({"text": text[i : i + 4000]}) + "\n"
            for text in texts
            for i in range(0, len(text), 4000)
        )
    )
    train_tokenizer_for([source], folder / "tokenizer.model", VOCAB, 10**6)
    prepare_source(
        "code",
        source,
        "PSF-2.0",
        folder / "data" / "code",
        folder / "tokenizer.model",
        validation_fraction=0.1,
        tasks=1,
    )
    train(config_of(folder), folder / "run")


def config_of(folder: pathlib.Path) -> ConfigDict:
    """What it is trained with."""
    config = recipe(
        "nano",
        [phase("nano", "phase1", seq_len=256, theta=(10_000.0, 10_000.0), shares={})],
    )
    with config.unlocked():
        config.data.sources = ConfigDict({"code": 1.0})
        config.corpora = {"code": {"url": f"file://{folder}/code.jsonl", "licence": "PSF-2.0"}}
    config.update(
        dict(seq_len=128, batch_size=8, tokens_per_step=1024, end_step=STEPS, log_every=20)
    )
    config.model.update(dict(vocab_size=VOCAB, num_layers=2))
    config.tokenizer.path, config.data.dir = str(folder / "tokenizer.model"), str(folder / "data")
    config.schedule.update(dict(warmup_steps=10, decay_start=STEPS // 2, total_steps=STEPS))
    config.validation.update(dict(every=STEPS, tokens=2048))
    config.checkpoint.every = STEPS
    return config
