"""What a task defines. The defaults are those of next-token prediction."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nanollama_jax.checkpoint import Metadata
from nanollama_jax.data.pipeline import Batch
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train import objectives
from nanollama_jax.train.feed import Feed

if TYPE_CHECKING:  # it imports the step, and that the tasks
    from nanollama_jax.train.hooks import Run

Means = dict[str, float]  # an objective's means over a batch or a validation split


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a task needs beyond its data: `attach` completes each batch on the host, and `metadata`
    is written into every checkpoint."""

    attach: Callable[[Batch], Batch] = lambda batch: batch
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task:
    """One task. Stateless: what a stage needs is passed in."""

    holds: str  # the kind of records that its sources hold
    fine_tunes: bool  # starts from a trained model, and counts its own tokens
    divergence_measure = "loss"  # the mean, in nats per token, that `Watch` follows

    # ---- Data

    def open_data(
        self, config: ConfigDict, tokenizer: Tokenizer, windows: dict[str, int] | None
    ) -> Feed:
        """Opens the sources of a stage. `windows` are the shuffle windows of the run that is
        resumed, if any. Raises BadInput for data that is missing, damaged or of another kind."""
        raise NotImplementedError

    def batch_spec(
        self, batch_size: int, seq_len: int, max_segments: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch on the device."""
        spec = functools.partial(jax.ShapeDtypeStruct, (batch_size, seq_len))
        names = ("tokens", "targets", "segment_ids", "positions")
        return {name: spec(np.int32) for name in names} | {"loss_weights": spec(np.float32)}

    def position(self, feed: Feed, earlier: dict[str, Any], seed: int) -> dict[str, Any]:
        """Where a stage is in its data: the state of its iterator under "batches"; under
        "positions", source -> where the next stage continues to read it. `earlier` are the
        positions that the stages before left."""
        return {"batches": feed.batches.get_state(), "positions": {}}

    def bytes_per_token(self, vocab_size: int) -> int:
        """Size of a token in prepared data, before compression."""
        raise NotImplementedError

    # ---- Computation

    def objective(self, config: ConfigDict, model: ModelConfig) -> Callable:
        """(params, batch, rope_theta) -> (loss to differentiate, sums to log)."""
        return functools.partial(
            objectives.next_token,
            model=model,
            z_loss=config.loss.z_loss,
            chunk_tokens=config.loss.chunk_tokens,
        )

    def prepare(
        self,
        config: ConfigDict,
        run: "Run",
        feed: Feed,
        shardings: Any,
        resumed_from: Metadata | None,
    ) -> Prepared:
        """What is computed once, before the first step. Parameters are laid out as `shardings`;
        `resumed_from` is the metadata of the run's own checkpoint, None for a new run."""
        return Prepared()

    def hooks(self, config: ConfigDict) -> dict[str, dict[str, Any]]:
        """Name -> settings of the hooks that only this task has."""
        return {}

    # ---- Reports

    def step_text(self, means: Means) -> str:
        """The task's part of a log line."""
        return f"ppl {_perplexity(means):,.1f}"

    def validation_record(self, found: dict[str, Means]) -> dict[str, Any]:
        """source -> means, as a row of metrics.jsonl."""
        return {"validation_perplexity": {name: _perplexity(v) for name, v in found.items()}}

    def validation_text(self, found: dict[str, Means]) -> str:
        """source -> means, for the log."""
        values = (f"{name} {_perplexity(means):,.2f}" for name, means in found.items())
        return "perplexity: " + "  ".join(values)

    def summary(self, validation: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A stage's last validation, a row of metrics.jsonl: for summary.json, and as text."""
        found = validation["validation_perplexity"]
        text = "  ".join(f"{name} {value:,.2f}" for name, value in found.items() if name != "all")
        return {"perplexity": found}, text


def _perplexity(means: Means) -> float:
    return math.exp(min(means["loss"], 50))
