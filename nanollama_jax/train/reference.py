"""DPO's reference: the log-probabilities that the model gave every answer before training, computed once, by the step's own kernels, and kept in
`WORKDIR/reference.npz` with fingerprints of the weights and of the data, and the kernels' precision.
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
    """`attach(batch)` gives a batch of pairs its `reference_logprobs`; `weights`, a fingerprint of the model's, is kept in checkpoints."""

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
    """Read from `workdir`, or computed with the weights of `initial_params()` and written there. `expected` is the fingerprint of the run that is
    gone on with, None for a new one. Raises BadInput where a file's fingerprint, or that of the weights, is another than it must be."""
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
                f"{path} is gone, and init_from={config.init_from} is not the model this run began with: set it back"
            )
        expected = weights
    if path.exists():
        found = _read(path)
        if (found["weights"], found["data"]) != (expected, of_data):
            what = "another model" if found["weights"] != expected else "other data"
            raise BadInput(
                f"{path} was computed with {what}: set that back, or remove the file to compute it anew, or choose another --workdir"
            )
        if found["kernels"] != kernels:
            raise BadInput(
                f"{path} was computed in {found['kernels']}, and this run is in {kernels}: set that back, or remove the file"
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
    """(pairs, 2) float32: the summed log-probabilities in nats of the chosen and the rejected answer of each pair in `splits`, by its number.

    Inside `sharding.use_mesh(mesh)`. Its progress is in the log of `stage`.
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
    """sha256 of all pairs in the order in which they are numbered."""
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
        raise BadInput(
            f"{path} is damaged ({error}): remove it, and it is computed anew"
        ) from error


def checksum(params: Any) -> str:
    """Of the bits of all weights (float32), however they are laid out over devices: a weighted sum of each tensor's, modulo 2^32."""
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_weighted_sum, tree))(params))
    return hashlib.sha256(
        repr(
            [(jax.tree_util.keystr(path), int(x)) for path, x in jax.tree.leaves_with_path(sums)]
        ).encode()
    ).hexdigest()


def _weighted_sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    weight = jnp.uint32(1)
    for axis in range(x.ndim):  # odd everywhere: no change of a single weight is lost
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
