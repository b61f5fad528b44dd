"""A checkpoint opened for use: weights, tokenizer and metadata, without the optimizer's state."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nanollama_jax.checkpoint.folders import FOLDER, find
from nanollama_jax.checkpoint.integrity import (
    CHECKSUMS,
    damage_is_bad_input,
    verify,
    verify_files,
)
from nanollama_jax.checkpoint.metadata import TASKS, Metadata, has_separate_projections
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import param_shapes, unstack_layers
from nanollama_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready for use."""

    model: ModelConfig  # layers unrolled
    params: dict[str, Any]  # float32, on the host, layers unrolled
    tokenizer: Tokenizer
    metadata: Metadata
    path: pathlib.Path

    @property
    def rope_theta(self) -> float:
        return self.metadata.rope_theta

    @property
    def context_length(self) -> int:
        return self.metadata.context_length


def read_metadata(workdir: str | os.PathLike, step: int) -> Metadata:
    """The metadata of a checkpoint that `find` found.

    Raises BadInput if it is damaged, or this version cannot read it.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER / f"step_{step}"
    checked = verify_files(folder, lambda name: name == "metadata/metadata")
    with damage_is_bad_input(folder):
        found = json.loads((folder / "metadata" / "metadata").read_text())
        if too_old := has_separate_projections(found):
            metadata = None
        else:
            metadata = Metadata.from_dict(found)
            if metadata.checksums and not checked:
                raise FileNotFoundError(f"{CHECKSUMS} is missing")
    if too_old:
        raise BadInput(
            f"{folder} is from an earlier version, which kept queries, keys and values apart: "
            "export it as a Hugging Face folder with that version, and import the folder here"
        )
    return metadata


def load(path: str | os.PathLike) -> Loaded:
    """Opens `WORKDIR/checkpoints/step_N`, the latest checkpoint of a workdir, or that of the last
    stage in a curriculum's workdir.

    Raises BadInput if there is none, or it is damaged.
    """
    path = pathlib.Path(os.path.abspath(path))
    stages = [path] if find(path) else sorted(stage for stage in path.glob("*/") if find(stage))
    if not stages:
        raise BadInput(_why_none(path))
    found = {stage: find(stage) for stage in stages}
    records = {stage: read_metadata(*at) for stage, at in found.items()}
    last_task = max((record.task for record in records.values()), key=TASKS.index)
    last = [stage for stage in stages if records[stage].task == last_task]
    models = {records[stage].model for stage in last}
    if len(models) > 1 or (len(last) > 1 and last_task != TASKS[0]):
        names = ", ".join(stage.name for stage in last)
        raise BadInput(f"{path} holds several models ({names}): name one of them")
    stage = max(last, key=lambda stage: found[stage][1])
    workdir, step = found[stage]
    return _open((workdir / FOLDER / f"step_{step}").absolute(), records[stage])


def _open(folder: pathlib.Path, metadata: Metadata) -> Loaded:
    verify(folder)
    with damage_is_bad_input(folder):
        tokenizer = json.loads((folder / "tokenizer" / "metadata").read_text())
        model_bytes = base64.b64decode(tokenizer["sentencepiece_model_base64"])
        if hashlib.sha256(model_bytes).hexdigest() != metadata.tokenizer_sha256:
            raise ValueError(
                "tokenizer/metadata is not the tokenizer of metadata's tokenizer_sha256"
            )
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            shapes = {"params": handler.metadata(folder / "state").tree["params"]}
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
            if differing := difference(metadata.model, target["params"]):
                raise ValueError(
                    f"metadata describes another model than state holds: {' '.join(differing)}"
                )
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            restore = ocp.args.PyTreeRestore(
                item=target, restore_args=on_host, partial_restore=True
            )
            params = handler.restore(folder / "state", args=restore)["params"]
    model = dataclasses.replace(metadata.model, scan_layers=False, remat="none")
    return Loaded(model, unstack_layers(params), Tokenizer(folder, model_bytes), metadata, folder)


def difference(model: ModelConfig, params: Any) -> tuple[str, str, str] | None:
    """The first parameter in which a model and a tree of arrays (or ShapeDtypeStructs, stacked or
    unrolled) differ: its name, its shape in the model and its shape in the tree; None if they
    agree.
    """
    shapes = param_shapes(dataclasses.replace(model, scan_layers="layers" in params))
    ours, theirs = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (shapes, params)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return name, str(ours.get(name)), str(theirs.get(name))
    return None


def _why_none(path: pathlib.Path) -> str:
    give = f"give a workdir that main.py trained in, or one of its {FOLDER}/step_N"
    if not path.is_dir():
        return f"{path}: there is no such folder; {give}"
    unfinished = ".orbax-checkpoint-tmp"
    if unfinished in path.name or any(path.glob(f"**/{FOLDER}/*{unfinished}*")):
        return (
            f"{path}: its first checkpoint is still being written, or writing was interrupted: "
            "wait for it, or name another"
        )
    return f"{path} holds no checkpoint; {give}"
