"""What a run's checkpoints state about their origin: code, libraries, config, corpora, tokens."""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.checkpoint import provenance
from nanollama_jax.model import ModelConfig
from nanollama_jax.train.feed import Feed
from nanollama_jax.train.start import Start
from nanollama_jax.train.tasks import Task

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece")


def describe(
    config: ConfigDict, model: ModelConfig, task: Task, start: Start, feed: Feed
) -> dict[str, Any]:
    """The metadata that all checkpoints of a run have in common."""
    before = start.metadata
    # A licence that the recipe states now, else the one that the corpus was prepared with
    named = config.tuning if task.fine_tunes else config.corpora
    corpora = {
        name: named.get(name, {}).get("licence") or feed.sources[name].manifest["licence"]
        for name in config.data.sources
    }
    earlier = {} if task.fine_tunes or not before else before.corpora
    new_tuning = task.fine_tunes and not start.resumed
    windows = {"shuffle_windows": feed.shuffle_windows} if feed.shuffle_windows else {}
    return {
        "phase": config.name,
        "model": dataclasses.asdict(model),
        **start.about_data,
        "git_commit": git_commit(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "config": json.loads(config.to_json_best_effort()),
        "context_length": max(config.seq_len, start.context_length),
        "provenance": provenance(before) if new_tuning else before and before.provenance,
        "corpora": earlier | corpora,
        **windows,
    }


@functools.cache
def git_commit() -> str:
    """The commit of this code, or why it is unknown."""
    if not shutil.which("git"):
        return "unknown: git is not installed"
    result = subprocess.run(
        ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown: not a git checkout"
