"""What a checkpoint is: everything needed to go on training, or to use the model, and nothing outside it.

One Orbax composite per step, in `WORKDIR/checkpoints/step_N`: `state` (params, optimizer, step counters; sharded, restorable on another number of
devices), `data` (the batch iterator's position), `metadata` (JSON: config, model, phase, tokens seen, checksums of tokenizer and data, versions)
and `tokenizer` (the SentencePiece model itself). It is written in the background under a temporary name and renamed when whole: a kill at any
moment leaves the last whole one.

`checksums.json` holds the sha256 of every file of the items. It is written before the rename, and compared before anything is restored.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import param_shapes, unstack_layers
from nanollama_jax.tokenizer import Tokenizer

log = logging.getLogger("nanollama")

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
SAVED = "latest_checkpoint.json"  # in the workdir: the last step that was reported saved
TASKS = ("pretrain", "sft", "dpo")  # in the order of a curriculum; each counts its steps anew


class Checkpoints:
    """The checkpoints of one workdir. Keeps the last `keep_last`, every one whose step is a multiple of `keep_every`
    (0: none of these), and the one with the lowest validation loss.
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
        self._saving: int | None = None  # a step that is not known to be whole yet
        writing = {} if read_only else dict(cleanup_tmp_directories=True, best_fn=_goodness)
        if not read_only:
            kept = [policies.LatestN(keep_last)] + (
                [policies.EveryNSteps(keep_every)] if keep_every else []
            )
            kept.append(
                policies.BestN(get_metric_fn=_goodness, n=1, keep_checkpoints_without_metrics=False)
            )
            writing["preservation_policy"] = policies.AnyPreservationPolicy(kept)
            writing["async_options"] = ocp.options.AsyncOptions(
                post_finalization_callback=self._write_checksums
            )
            for _, folder in _steps(self.directory):
                _verify(folder, lambda name: name == "metrics/metrics")  # Orbax reads it here
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
        metadata: dict[str, Any],
        tokenizer_model: bytes,
        validation_loss: float | None = None,
    ) -> None:
        """Copies the state and returns; writing goes on in the background and has ended when `wait` returns. Raises BadInput if the disk is full.

        `validation_loss` is that of this very step, None if it was not measured; one that is not finite never counts as the best.
        """
        self.wait()
        needed, free = (
            sum(x.nbytes for x in jax.tree.leaves(state)),
            shutil.disk_usage(self.directory).free,
        )
        if free < needed:
            raise BadInput(
                f"no room for the checkpoint of step {step} in {self.directory}: it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; "
                f"free some space and run the same command again: it goes on from step {self.latest_step()}"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            metadata=ocp.args.JsonSave(metadata | {"checksums": CHECKSUMS}),
            tokenizer=ocp.args.JsonSave(
                {"sentencepiece_model_base64": base64.b64encode(tokenizer_model).decode()}
            ),
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
        """Returns when what was saved is whole on disk."""
        with self._disk_full_is_bad_input():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._saving is not None and jax.process_index() == 0:
                write_json(self.directory.parent / SAVED, {"step": self._saving})
            self._saving = None

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out by `shardings` whatever the layout it was saved from, and the data iterator's position.

        Raises BadInput for a checkpoint that is damaged.
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
        with _damage_is_bad_input(folder):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
                ),
            )
        return items["state"], items["data"]

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _write_checksums(self) -> None:
        """Called by Orbax in the background and in the primary process alone: all items are in their final form, the step is not."""
        (folder,) = (
            path
            for path in self.directory.iterdir()
            if path.name.startswith(f"step_{self._saving}.orbax-checkpoint-tmp")
        )
        write_json(folder / CHECKSUMS, _sha256_of(folder, _files_of(folder)))

    @contextlib.contextmanager
    def _disk_full_is_bad_input(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # TensorStore reports a full disk as a ValueError that quotes the operating system
            if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(
                errno.ENOSPC
            ) not in str(error):
                raise
            raise BadInput(
                f"the disk of {self.directory} is full: free some space and run the same command again; it goes on from step {self.latest_step()}"
            ) from error


def find(path: str | os.PathLike) -> tuple[pathlib.Path, int] | None:
    """`(workdir, step)` of the latest checkpoint in a workdir, or of `WORKDIR/checkpoints/step_N` itself; None if there is none.

    Reads folders' names only, and whether what is in them is a checkpoint or somebody's workdir: an unfinished checkpoint
    has another name.
    """
    path = pathlib.Path(path)
    absolute = pathlib.Path(os.path.abspath(path))
    if is_checkpoint(absolute):
        return absolute.parent.parent, _step_of(absolute)
    steps = [step for step, _ in _steps(path / FOLDER)]
    return (path, max(steps)) if steps else None


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether this is one checkpoint of a run: `checkpoints/step_N`, unless it holds something else."""
    return folder.parent.name == FOLDER and _step_of(folder) is not None and _holds_items(folder)


def _holds_items(folder: pathlib.Path) -> bool:
    return (folder / "metadata").exists() or (folder / "state").exists()


def _step_of(folder: pathlib.Path) -> int | None:
    number = folder.name.removeprefix("step_")
    return int(number) if folder.name.startswith("step_") and number.isdecimal() else None


def _steps(directory: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """The checkpoints of a workdir, in order. An empty one is damaged; one that holds other things is a workdir in this place."""
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if _step_of(path) is not None and path.is_dir()]
    return sorted(
        (_step_of(path), path) for path in folders if _holds_items(path) or not any(path.iterdir())
    )


def reported_saved(workdir: str | os.PathLike) -> int | None:
    """The last step that a run in `workdir` reported saved, whether it is still there or not; None if it saved none.

    Checkpoints of earlier versions left no such record.
    """
    path = pathlib.Path(workdir) / SAVED
    return json.loads(path.read_text())["step"] if path.exists() else None


def _goodness(metrics: dict[str, float]) -> float:
    return -metrics["validation_loss"]


def _files_of(folder: pathlib.Path) -> list[str]:
    """What a checkpoint's items consist of. Not the files beside them: Orbax writes its own there after the checksums."""
    return sorted(
        file.relative_to(folder).as_posix()
        for item in folder.iterdir()
        if item.is_dir()
        for file in item.rglob("*")
        if file.is_file()
    )


def _sha256_of(folder: pathlib.Path, names: list[str]) -> dict[str, str | None]:
    """name -> sha256 of each file, None if it is not there. Takes 0.65 s of one core per GB (x86 with SHA extensions)."""

    def sha256(name: str) -> str | None:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as threads:
        return dict(zip(names, threads.map(sha256, names), strict=True))


def verify(folder: pathlib.Path) -> None:
    """Reads a whole checkpoint and raises BadInput if a file is not what was written. One without checksums (of an earlier
    version) gets a warning.
    """
    if not _verify(folder, lambda name: True):
        log.warning(
            "%s is of an earlier version and has no checksums: whether it is damaged cannot be told",
            folder,
        )


def _verify(folder: pathlib.Path, wanted: Callable[[str], bool]) -> bool:
    """Compares the files whose name is `wanted` with their checksums. False if there are no checksums."""
    if not (folder / CHECKSUMS).exists():
        if not folder.is_dir():
            raise _damaged(folder, "missing")
        return False
    with _damage_is_bad_input(folder):
        expected = dict(json.loads((folder / CHECKSUMS).read_text()))
        present = _files_of(folder)
        found = _sha256_of(folder, [name for name in expected if wanted(name)])
    for name, sha256 in found.items():
        if sha256 != expected[name]:
            raise _damaged(
                folder,
                f"{name} is {'missing' if sha256 is None else 'not what was written: its sha256 differs'}",
            )
    for name in present:
        if name not in expected and wanted(name) and not pathlib.Path(name).name.startswith("."):
            raise _damaged(folder, f"{name} is not one of its files")
    return True


def _damaged(folder: pathlib.Path, how: str) -> BadInput:
    """How to go on without a checkpoint that cannot be used. A run deletes old ones: then another reader finds files missing."""
    if not folder.is_dir():
        return BadInput(
            f"{folder} was deleted while it was read, as a run does with old checkpoints: rerun, or name a later one"
        )
    earlier = [step for step, _ in _steps(folder.parent) if step < (_step_of(folder) or 0)]
    if earlier:
        remedy = f"to go back to step {max(earlier)}, rename it to {folder.parent / f'damaged_{folder.name}'} and rerun"
    else:
        remedy = "there is no earlier one here: restore it from a copy, or start again in another workdir"
    return BadInput(f"{folder} is damaged ({' '.join(how.split())[:300]}): {remedy}")


@contextlib.contextmanager
def _damage_is_bad_input(folder: pathlib.Path) -> Iterator[None]:
    """For what Orbax, TensorStore and json raise for a checkpoint without checksums, or one that is deleted meanwhile."""
    try:
        yield
    except (BadInput, jax.errors.JaxRuntimeError):
        raise  # the latter is the device's: out of memory
    except OSError as error:
        if error.errno not in (None, errno.ENOENT, errno.EIO):
            raise  # permissions, too many open files: not the checkpoint's fault
        raise _damaged(folder, str(error)) from error
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, f"or no checkpoint of this program: {error!r}") from error


def read_metadata(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint that `find` found. Raises BadInput if it is damaged, or this version cannot read it."""
    return _read_metadata(pathlib.Path(workdir).absolute() / FOLDER / f"step_{step}")


def _read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    checked = _verify(folder, lambda name: name == "metadata/metadata")
    with _damage_is_bad_input(folder):
        metadata = json.loads((folder / "metadata" / "metadata").read_text())
        old = "packed_documents" not in metadata["model"]
        if "checksums" in metadata and not checked:
            raise FileNotFoundError(f"{CHECKSUMS} is missing")
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
    tasks = {
        stage: TASKS.index(read_metadata(*at).get("config", {}).get("task", "pretrain"))
        for stage, at in found.items()
    }
    last = [stage for stage in stages if tasks[stage] == max(tasks.values())]
    if len({json.dumps(read_metadata(*found[stage])["model"]) for stage in last}) > 1 or (
        len(last) > 1 and max(tasks.values())
    ):
        raise BadInput(
            f"{path} holds several models ({', '.join(stage.name for stage in last)}): name one of them"
        )
    workdir, step = max((found[stage] for stage in last), key=lambda at: at[1])
    folder = (workdir / FOLDER / f"step_{step}").absolute()
    metadata = read_metadata(workdir, step)
    verify(folder)
    with _damage_is_bad_input(folder):
        model_bytes = base64.b64decode(
            json.loads((folder / "tokenizer" / "metadata").read_text())[
                "sentencepiece_model_base64"
            ]
        )
        if hashlib.sha256(model_bytes).hexdigest() != metadata["tokenizer_sha256"]:
            raise ValueError(
                "tokenizer/metadata is not the tokenizer of metadata's tokenizer_sha256"
            )
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            shapes = {"params": handler.metadata(folder / "state").tree["params"]}
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
            _check_shapes(metadata["model"], target["params"])
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            restore = ocp.args.PyTreeRestore(
                item=target, restore_args=on_host, partial_restore=True
            )
            params = handler.restore(folder / "state", args=restore)["params"]
        model = ModelConfig(**metadata["model"] | dict(scan_layers=False, remat="none"))
        metadata["rope_theta"]  # or KeyError
    return Loaded(model, unstack_layers(params), Tokenizer(folder, model_bytes), metadata, folder)


def _check_shapes(model: dict[str, Any], params: Any) -> None:
    """Raises ValueError if the model that the metadata describes has other parameters than these (ShapeDtypeStructs)."""
    described = param_shapes(ModelConfig(**model | dict(scan_layers="layers" in params)))
    described, stored = (
        {
            "/".join(key.key for key in path): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (described, params)
    )
    for name in sorted(described.keys() | stored.keys()):
        if described.get(name) != stored.get(name):
            raise ValueError(
                f"metadata describes another model than state holds: {name} {described.get(name)}, {stored.get(name)}"
            )


def weights_metadata(
    model: ModelConfig,
    tokenizer: Tokenizer,
    rope_theta: float,
    context_length: int,
    provenance: dict[str, Any],
) -> dict[str, Any]:
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
        checkpoints.save(
            0, {"params": loaded.params}, {}, loaded.metadata, loaded.tokenizer.model_bytes
        )
    return pathlib.Path(workdir) / FOLDER / "step_0"


def _why_none(path: pathlib.Path) -> str:
    if not path.is_dir():
        return f"{path}: there is no such folder; give a workdir that main.py trained in, or one of its {FOLDER}/step_N"
    if ".orbax-checkpoint-tmp" in path.name or any(
        path.glob(f"**/{FOLDER}/*.orbax-checkpoint-tmp*")
    ):
        return f"{path}: its first checkpoint is still being written (or its writing was cut short): wait for it, or name another"
    return f"{path} holds no checkpoint; give a workdir that main.py trained in, or one of its {FOLDER}/step_N"
