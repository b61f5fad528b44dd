"""DPO's reference: the log-probability of every answer under the model before training. It is
computed once, with the kernels of the training step, and kept in `WORKDIR/reference.npz` with
fingerprints of weights and data, and the kernels' precision.
"""

import functools
import hashlib
import itertools
import pathlib
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nanollama_jax import sharding
from nanollama_jax.data.pipeline import Batch
from nanollama_jax.data.rows import Rows
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.train.feed import Feed
from nanollama_jax.train.metrics import log
from nanollama_jax.train.objectives import answer_logprobs

FILE = "reference.npz"


class Reference:
    """`attach` adds `reference_logprobs` to a batch of pairs. `weights`, a fingerprint of the
    model, is kept in checkpoints."""

    def __init__(self, logprobs: np.ndarray, weights: str):
        self.logprobs, self.weights = logprobs, weights  # (pairs, 2) float32: chosen, rejected

    def attach(self, batch: Batch) -> Batch:
        pairs_BP = batch["pairs"]
        found_BP2 = np.where(pairs_BP[..., None] >= 0, self.logprobs[pairs_BP], np.float32(0))
        return {name: array for name, array in batch.items() if name != "pairs"} | {
            "reference_logprobs": found_BP2.reshape(len(pairs_BP), -1)
        }


def open_reference(
    config: ConfigDict,
    workdir: pathlib.Path,
    feed: Feed,
    expected: str | None,
    initial_params: Callable[[], Any],
    model: ModelConfig,
    rope_theta: float,
    mesh: Any,
) -> Reference:
    """Reads the reference from `workdir`, or computes it with the weights of `initial_params()` and
    writes it there. `expected` is the fingerprint that a resumed run has, None for a new run.
    Raises BadInput if the file or the weights have another fingerprint."""
    path, of_data, kernels = (
        workdir / FILE,
        fingerprint(feed),
        f"{model.dtype}, {model.attention} attention",
    )
    params = None
    if expected is None or not path.exists():
        params = initial_params()
        weights = checksum(params)
        if expected not in (None, weights):
            raise BadInput(
                f"{path} is missing, and init_from={config.init_from} is not the model that this "
                "run started from: set init_from back"
            )
        expected = weights
    if path.exists():
        found = _read(path)
        if (found["weights"], found["data"]) != (expected, of_data):
            what = "another model" if found["weights"] != expected else "other data"
            raise BadInput(
                f"{path} was computed with {what}: set that back, remove the file to compute it "
                "again, or choose another --workdir"
            )
        if found["kernels"] != kernels:
            raise BadInput(
                f"{path} was computed with {found['kernels']}, and this run uses {kernels}: set "
                "that back, or remove the file"
            )
        return Reference(found["logprobs"], expected)

    settings = dict(
        batch_size=config.batch_size // config.accumulation, chunk_tokens=config.loss.chunk_tokens
    )
    logprobs = pair_logprobs(
        params,
        feed.rows,
        model=model,
        rope_theta=rope_theta,
        mesh=mesh,
        stage=config.name,
        **settings,
    )
    if jax.process_index() == 0:
        with whole_file(path) as file:
            np.savez(file, logprobs=logprobs, weights=expected, data=of_data, kernels=kernels)
    return Reference(logprobs, expected)


def pair_logprobs(
    params: Any,
    splits: Sequence[Rows],
    *,
    model: ModelConfig,
    rope_theta: float,
    mesh: Any,
    batch_size: int,
    chunk_tokens: int,
    stage: str = "dpo",
) -> np.ndarray:
    """(pairs, 2) float32: the summed log-probabilities in nats of the chosen and the rejected
    answer of each pair in `splits`, by its number.

    Call it inside `sharding.use_mesh(mesh)`. Logs its progress under the name `stage`.
    """
    logprobs = np.zeros((sum(len(rows.units) for rows in splits), 2), np.float32)
    total, done, said = sum(len(rows) for rows in splits), 0, time.monotonic()
    log.info(
        "%s: log-probabilities of the reference: %d pairs in %d rows", stage, len(logprobs), total
    )
    settings = dict(model=model, segments=splits[0].max_segments, chunk_tokens=chunk_tokens)
    step = jax.jit(
        functools.partial(_logprobs, **settings), out_shardings=sharding.replicated(mesh)
    )
    for batch in itertools.chain.from_iterable(rows.batches(batch_size) for rows in splits):
        pairs_BP = batch.pop("pairs")
        found_BM = np.asarray(step(params, sharding.put_batch(batch, mesh), np.float32(rope_theta)))
        logprobs[pairs_BP[pairs_BP >= 0]] = found_BM.reshape(*pairs_BP.shape, 2)[pairs_BP >= 0]
        done += len(pairs_BP)
        if time.monotonic() - said > 30:
            log.info("%s: reference: %d of %d rows", stage, done, total)
            said = time.monotonic()
    return logprobs


def fingerprint(feed: Feed) -> str:
    """sha256 of all pairs in the order of their numbers."""
    found = hashlib.sha256()
    for rows in feed.rows:
        for side in itertools.chain.from_iterable(rows.units):
            found.update(np.uint32(len(side)).tobytes() + side.tobytes())
    return found.hexdigest()


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {"logprobs": file["logprobs"]} | {
                key: str(file[key]) for key in ("weights", "data", "kernels")
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is damaged ({error}): remove it to compute it again") from error


def checksum(params: Any) -> str:
    """A fingerprint of all weights (float32), whatever their layout over devices: from a weighted
    sum of each tensor's bits, modulo 2^32."""
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_weighted_sum, tree))(params))
    return hashlib.sha256(
        repr(
            [(jax.tree_util.keystr(path), int(x)) for path, x in jax.tree.leaves_with_path(sums)]
        ).encode()
    ).hexdigest()


def _weighted_sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    weight = jnp.uint32(1)
    for axis in range(x.ndim):  # odd everywhere, so that a change of one weight always shows
        weight += (
            2
            * jnp.uint32(2_654_435_761 + 40_503 * axis)
            * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        )
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _logprobs(
    params: Any,
    batch: dict[str, jax.Array],
    rope_theta: jax.Array,
    *,
    model: ModelConfig,
    segments: int,
    chunk_tokens: int,
) -> jax.Array:
    hidden_BTD = Llama(model).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"], rope_theta
    )
    return answer_logprobs(hidden_BTD, params["head"]["kernel"], batch, segments, chunk_tokens)[0]
