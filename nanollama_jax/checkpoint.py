"""What a checkpoint is: everything needed to go on training, or to use the model, and nothing outside it.

One Orbax composite per step, in `WORKDIR/checkpoints/step_N`: `state` (params, optimizer, step counters; sharded, restorable on another number of
devices), `data` (the batch iterator's position), `metadata` (JSON: config, model, phase, tokens seen, checksums of tokenizer and data, versions)
and `tokenizer` (the SentencePiece model itself). It is written in the background under a temporary name and renamed when whole: a kill at any
moment leaves the last whole one.
"""

import base64
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import unstack_layers
from nanollama_jax.tokenizer import Tokenizer

FOLDER = "checkpoints"
TASKS = ("pretrain", "sft", "dpo")  # in the order of a curriculum; each counts its steps anew


class Checkpoints:
    """The checkpoints of one workdir. Keeps the last `keep_last`, and every one whose step is a multiple of `keep_every` (0: none of these)."""

    def __init__(self, workdir: str | os.PathLike, keep_last: int | None = None, keep_every: int = 0, *, read_only: bool = False):
        self.directory = pathlib.Path(workdir).absolute() / FOLDER
        writing = {} if read_only else dict(max_to_keep=keep_last, keep_period=keep_every or None, cleanup_tmp_directories=True)
        options = ocp.CheckpointManagerOptions(step_prefix="step", read_only=read_only, **writing)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "data", "metadata", "tokenizer"))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any], metadata: dict[str, Any], tokenizer_model: bytes) -> None:
        """Copies the state and returns; writing goes on in the background and has ended when `wait` returns. Raises BadInput if the disk is full."""
        self.wait()
        needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if free < needed:
            raise BadInput(
                f"no room for the checkpoint of step {step} in {self.directory}: it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; "
                f"free some space and run the same command again: it goes on from step {self.latest_step()}"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            metadata=ocp.args.JsonSave(metadata),
            tokenizer=ocp.args.JsonSave({"sentencepiece_model_base64": base64.b64encode(tokenizer_model).decode()}),
        )
        with self._disk_full_is_bad_input():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when what was saved is whole on disk."""
        with self._disk_full_is_bad_input():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out by `shardings` whatever the layout it was saved from, and the data iterator's position."""
        target = jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings)
        items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()))
        return items["state"], items["data"]

    def close(self) -> None:
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _disk_full_is_bad_input(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # TensorStore reports a full disk as a ValueError that quotes the operating system
            if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise BadInput(
                f"the disk of {self.directory} is full: free some space and run the same command again; it goes on from step {self.latest_step()}"
            ) from error


def find(path: str | os.PathLike) -> tuple[pathlib.Path, int] | None:
    """`(workdir, step)` of the latest checkpoint in a workdir, or of `WORKDIR/checkpoints/step_N` itself; None if there is none.

    Reads folder names only: an unfinished checkpoint has another name.
    """
    path = pathlib.Path(path)
    named = path.parent.name == FOLDER
    folders = [path] if named else (path / FOLDER).glob("step_*")
    steps = [int(p.name.removeprefix("step_")) for p in folders if p.name.removeprefix("step_").isdecimal() and p.is_dir()]
    return (path.parent.parent if named else path, max(steps)) if steps else None


def read_metadata(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint that `find` found. Raises BadInput if this version cannot read it."""
    folder = pathlib.Path(workdir) / FOLDER / f"step_{step}"
    try:
        metadata = json.loads((folder / "metadata" / "metadata").read_text())
        old = "packed_documents" not in metadata["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} is damaged, or no checkpoint of this program: {' '.join(str(error).split())[:300]}") from error
    if old:
        raise BadInput(
            f"{folder} is of an earlier version, which kept queries, keys and values apart: export it with that version (tools/export_hf.py), and "
            "import what that gives (tools/import_hf.py)"
        )
    return metadata


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model to use: what a checkpoint says about itself, without the optimizer's state."""

    model: ModelConfig  # layers unrolled
    params: dict[str, Any]  # float32, on the host, layers unrolled
    tokenizer: Tokenizer
    metadata: dict[str, Any]
    path: pathlib.Path

    @property
    def rope_theta(self) -> float:
        return self.metadata["rope_theta"]

    @property
    def context_length(self) -> int:
        """The longest row that the model was trained on, tokens; of an import, what its folder says."""
        return self.metadata["context_length"]


def load(path: str | os.PathLike) -> Loaded:
    """Opens a checkpoint for use: `WORKDIR/checkpoints/step_N`, or the latest of a workdir, or of the last stage of a curriculum's workdir.

    Raises BadInput if there is none, or it is not whole.
    """
    path = pathlib.Path(os.path.abspath(path))
    stages = [path] if find(path) else sorted(stage for stage in path.glob("*/") if find(stage))
    if not stages:
        raise BadInput(_why_none(path))
    found = {stage: find(stage) for stage in stages}
    tasks = {stage: TASKS.index(read_metadata(*at).get("config", {}).get("task", "pretrain")) for stage, at in found.items()}
    last = [stage for stage in stages if tasks[stage] == max(tasks.values())]
    if len({json.dumps(read_metadata(*found[stage])["model"]) for stage in last}) > 1 or (len(last) > 1 and max(tasks.values())):
        raise BadInput(f"{path} holds several models ({', '.join(stage.name for stage in last)}): name one of them")
    workdir, step = max((found[stage] for stage in last), key=lambda at: at[1])
    folder = (workdir / FOLDER / f"step_{step}").absolute()
    try:
        metadata = read_metadata(workdir, step)
        model_bytes = base64.b64decode(json.loads((folder / "tokenizer" / "metadata").read_text())["sentencepiece_model_base64"])
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            shapes = {"params": handler.metadata(folder / "state").tree["params"]}
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            restore = ocp.args.PyTreeRestore(item=target, restore_args=on_host, partial_restore=True)
            params = handler.restore(folder / "state", args=restore)["params"]
        model = ModelConfig(**metadata["model"] | dict(scan_layers=False, remat="none"))
        metadata["rope_theta"]  # or KeyError
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:  # Orbax and TensorStore report damage by all of these
        raise BadInput(f"{folder} is damaged, or no checkpoint of this program: {' '.join(str(error).split())[:300]}") from error
    return Loaded(model, unstack_layers(params), Tokenizer(folder, model_bytes), metadata, folder)


def weights_metadata(model: ModelConfig, tokenizer: Tokenizer, rope_theta: float, context_length: int, provenance: dict[str, Any]) -> dict[str, Any]:
    """The metadata of weights that come from elsewhere."""
    return {
        "weights_only": True,
        "phase": "imported",
        "step": 0,
        "tokens_seen": 0,
        "model": dataclasses.asdict(model),
        "rope_theta": rope_theta,
        "context_length": context_length,
        "tokenizer_sha256": tokenizer.sha256,
        "provenance": provenance,
    }


def save_weights(loaded: Loaded, workdir: str | os.PathLike) -> pathlib.Path:
    """A checkpoint without optimizer state, at step 0: what `config.init_from` and every tool can start from. Raises BadInput if there is one."""
    if (pathlib.Path(workdir) / FOLDER).exists():
        raise BadInput(f"{workdir} has checkpoints already: choose another folder")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(0, {"params": loaded.params}, {}, loaded.metadata, loaded.tokenizer.model_bytes)
    return pathlib.Path(workdir) / FOLDER / "step_0"


def _why_none(path: pathlib.Path) -> str:
    if not path.is_dir():
        return f"{path}: there is no such folder; give a workdir that main.py trained in, or one of its {FOLDER}/step_N"
    if ".orbax-checkpoint-tmp" in path.name or any(path.glob(f"**/{FOLDER}/*.orbax-checkpoint-tmp*")):
        return f"{path}: its first checkpoint is still being written (or its writing was cut short): wait for it, or name another"
    return f"{path} holds no checkpoint; give a workdir that main.py trained in, or one of its {FOLDER}/step_N"
