"""Saves and restores checkpoints. One holds all that is needed to resume training, or to use the
model.

Each step is one Orbax composite in `WORKDIR/checkpoints/step_N`: `state` (parameters, optimizer,
step counters; sharded, restorable on another number of devices), `data` (the batch iterator's
position), `metadata` (see metadata.py) and `tokenizer` (the SentencePiece model itself). It is
written in the background under a temporary name and renamed when complete: a kill at any moment
leaves the last complete one.
"""

import base64
import contextlib
import dataclasses
import errno
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from nanollama_jax.checkpoint.folders import FOLDER, SAVED, steps_in
from nanollama_jax.checkpoint.integrity import (
    CHECKSUMS,
    damage_is_bad_input,
    verify,
    verify_files,
    write_checksums,
)
from nanollama_jax.checkpoint.loading import Loaded
from nanollama_jax.checkpoint.metadata import Metadata
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json


class Checkpoints:
    """The checkpoints of one workdir. Keeps the last `keep_last`, every one whose step is a
    multiple of `keep_every` (0: none of these), and the one with the lowest validation loss.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep_last: int | None = None,
        keep_every: int = 0,
        *,
        read_only: bool = False,
    ):
        self.directory = pathlib.Path(workdir).absolute() / FOLDER
        self._saving: int | None = None  # a step that may not be complete on disk yet
        writing = {}
        if not read_only:
            for step in steps_in(self.directory):  # Orbax reads their metrics when it starts
                verify_files(
                    self.directory / f"step_{step}", lambda name: name == "metrics/metrics"
                )
            kept = [
                policies.LatestN(keep_last),
                *([policies.EveryNSteps(keep_every)] if keep_every else []),
                policies.BestN(
                    get_metric_fn=_goodness, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
            writing = dict(
                cleanup_tmp_directories=True,
                best_fn=_goodness,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
            )
        options = ocp.CheckpointManagerOptions(step_prefix="step", read_only=read_only, **writing)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "data", "metadata", "tokenizer")
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        data: dict[str, Any],
        metadata: Metadata | dict[str, Any],
        tokenizer_model: bytes,
        validation_loss: float | None = None,
    ) -> None:
        """Copies the state and returns. Writing continues in the background until `wait` returns.

        `metadata` may be the JSON object of a record. `validation_loss` is that of this very step,
        None if it was not measured; one that is not finite never counts as the best. Raises
        BadInput if the disk is full.
        """
        if isinstance(metadata, dict):
            metadata = Metadata.from_dict(metadata)
        metadata = dataclasses.replace(metadata, checksums=CHECKSUMS)
        self.wait()
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise BadInput(
                f"no room for the checkpoint of step {step} in {self.directory}: it needs "
                f"{needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; free some space and "
                f"rerun to resume from step {self.latest_step()}"
            )
        encoded = base64.b64encode(tokenizer_model).decode()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            metadata=ocp.args.JsonSave(metadata.to_dict()),
            tokenizer=ocp.args.JsonSave({"sentencepiece_model_base64": encoded}),
        )
        known = validation_loss is not None and math.isfinite(validation_loss)
        with self._disk_full_is_bad_input():
            self._saving = step
            self._manager.save(
                step,
                args=items,
                force=True,
                metrics={"validation_loss": validation_loss} if known else None,
            )

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        with self._disk_full_is_bad_input():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._saving is not None and jax.process_index() == 0:
                write_json(self.directory.parent / SAVED, {"step": self._saving})
            self._saving = None

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out by `shardings` whatever layout it was saved from, and the data
        iterator's position. Raises BadInput if the checkpoint is damaged.
        """
        folder = self.directory / f"step_{step}"
        verify(folder)
        target = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            shardings,
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
        )
        with damage_is_bad_input(folder):
            restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _write_checksums(self) -> None:
        """Orbax calls this in the background, in the primary process only, when all items are in
        their final form and the checkpoint is not."""
        temporary = f"step_{self._saving}.orbax-checkpoint-tmp"
        (folder,) = (path for path in self.directory.iterdir() if path.name.startswith(temporary))
        write_checksums(folder)

    @contextlib.contextmanager
    def _disk_full_is_bad_input(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # TensorStore reports a full disk as a ValueError that quotes the operating system.
            full = errno.ENOSPC
            if getattr(error, "errno", None) != full and os.strerror(full) not in str(error):
                raise
            raise BadInput(
                f"the disk of {self.directory} is full: free some space and rerun to resume from "
                f"step {self.latest_step()}"
            ) from error


def _goodness(metrics: dict[str, float]) -> float:
    return -metrics["validation_loss"]


def save_weights(loaded: Loaded, workdir: str | os.PathLike) -> pathlib.Path:
    """Writes a checkpoint without optimizer state, at step 0, and returns its folder. Training can
    start from it and every tool can open it.

    Raises BadInput if the workdir already has checkpoints.
    """
    directory = pathlib.Path(workdir) / FOLDER
    if directory.exists():
        raise BadInput(f"{workdir} already has checkpoints: choose another folder")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(
            0, {"params": loaded.params}, {}, loaded.metadata, loaded.tokenizer.model_bytes
        )
    return directory / "step_0"
