"""Where a stage starts: its workdir, the checkpoint that it continues, and what it inherits."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from nanollama_jax import checkpoint, distributed
from nanollama_jax.checkpoint.origin import (
    check_changes,
    find_origin,
    initial_params,
    write_config,
)
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train import metrics
from nanollama_jax.train.feed import Feed
from nanollama_jax.train.hooks import Run, milestones
from nanollama_jax.train.hooks.divergence import Watch
from nanollama_jax.train.metrics import log
from nanollama_jax.train.optimizer import schedules
from nanollama_jax.train.step import Program, TrainState
from nanollama_jax.train.tasks import Task


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the workdir and logs into it. Inside, no other run can use it: two would overwrite each
    other's checkpoints. Raises BadInput if one does."""
    if checkpoint.is_checkpoint(workdir.absolute()):
        raise BadInput(
            f"--workdir={workdir} is a checkpoint: name its run, "
            f"{workdir.absolute().parent.parent}, or another folder"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    is_main = jax.process_index() == 0
    in_use = f"another run is at work in {workdir}: wait for it, or choose another --workdir"
    with locked(workdir / ".lock", in_use) if is_main else contextlib.nullcontext():
        metrics.set_up_logging(workdir, is_main)
        yield


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a stage starts from; none if it starts from scratch."""

    workdir: pathlib.Path | None
    step: int
    metadata: checkpoint.Metadata | None  # of the checkpoint
    resumed: bool  # it is the run's own
    about_data: dict[str, str]  # fingerprints of the tokenizer and of the training data
    tokens_seen: int  # up to here, of those that the stage counts

    @property
    def lowest_loss(self) -> dict[str, float]:
        """Of the run itself, for `divergence.Watch`."""
        return self.metadata.lowest_loss if self.resumed else {}

    @property
    def context_length(self) -> int:
        """Tokens of the longest row that the weights were trained on; 0 from scratch."""
        return self.metadata.context_length if self.metadata else 0

    @property
    def checkpoint(self) -> pathlib.Path | None:
        """Its folder."""
        if self.workdir is None:
            return None
        return self.workdir.absolute() / checkpoint.FOLDER / f"step_{self.step}"

    def __str__(self) -> str:
        if self.workdir is None:
            return "from scratch"
        if self.resumed:
            return f"resumed from {self.workdir} at step {self.step}"
        return f"from step {self.step} of {self.workdir}"


def find_start(
    config: ConfigDict,
    workdir: pathlib.Path,
    model: ModelConfig,
    task: Task,
    tokenizer: Tokenizer,
    feed: Feed,
) -> Start:
    """Takes the run's own latest checkpoint, else that of `config.init_from`, else none.

    Raises BadInput for one that does not fit the config, and unless all processes found the same.
    """
    about_data = {
        "tokenizer_sha256": tokenizer.sha256,
        "data_sha256": pipeline.fingerprint({k: feed.sources[k] for k in config.data.sources}),
    }
    origin, step = find_origin(config, workdir, model, about_data)
    distributed.check_agreement(
        {
            "tokenizer": tokenizer.sha256,
            "data": {
                name: pipeline.fingerprint({name: source}) for name, source in feed.sources.items()
            },
            "start": f"{origin} at step {step}",
        }
    )
    metadata = checkpoint.read_metadata(origin, step) if origin else None
    resumed = origin == workdir
    counted = metadata and (resumed or not task.fine_tunes)
    tokens = metadata.tokens_seen if counted else 0
    if tokens:
        how = (
            ""
            if metadata.tokens_seen_is_exact
            else " (by an earlier version, from this stage's tokens per step)"
        )
        log.info("%s: %s tokens seen up to step %d%s", config.name, f"{tokens:,}", step, how)
    if resumed:
        now = json.loads(config.to_json_best_effort())
        if changed := check_changes(metadata.config, now, step, schedules):
            log.warning("%s: %s", config.name, changed)
    return Start(origin, step, metadata, resumed, about_data, tokens)


def initial_state(
    config: ConfigDict,
    start: Start,
    task: Task,
    program: Program,
    model: ModelConfig,
    checkpoints: checkpoint.Checkpoints,
    feed: Feed,
) -> tuple[TrainState, dict[str, Any]]:
    """`(state, positions)`. Restores the state of training, or makes one, and moves `feed.batches`
    to where it continues. `positions` is where earlier stages left each source."""
    shapes, shardings = program.state_shapes, program.state_shardings
    if start.workdir is None:
        (checkpoints.directory.parent / "gates.json").unlink(missing_ok=True)
        return program.make_state(), {}
    if start.resumed:
        state, data = checkpoints.restore(start.step, shapes, shardings)
        feed.batches.set_state(data["batches"])
        return state, data["positions"]
    if task.fine_tunes or start.metadata.weights_only:
        params = initial_params(start.workdir, start.step, model)
        params = jax.device_put(params, shardings.params)
        return program.make_state().replace(params=params), {}
    with contextlib.closing(checkpoint.Checkpoints(start.workdir, read_only=True)) as other:
        state, data = other.restore(start.step, shapes, shardings)
    position, restarted = pipeline.resume_at(
        feed.batches.get_state(), data["positions"], feed.sources, config.seed
    )
    feed.batches.set_state(position)
    if restarted:
        log.warning(
            "%s: restarting these sources: the seed or the corpus changed: %s",
            config.name,
            ", ".join(restarted),
        )
    return state, data["positions"]


def record_start(
    config: ConfigDict,
    model: ModelConfig,
    workdir: pathlib.Path,
    start: Start,
    mesh: jax.sharding.Mesh,
) -> None:
    """Writes the resolved config into the workdir. Logs where the weights come from, and what runs
    where."""
    if jax.process_index() == 0:
        resolved = ConfigDict(config.to_dict() | {"model": dataclasses.asdict(model)})
        content = resolved.to_json_best_effort(indent=1).encode() + b"\n"
        write_config(workdir, content, start.step if start.resumed else None)
    log.info("%s: weights %s", config.name, start)
    devices = mesh.devices.flatten()
    log.info(
        "%s: %s parameters, %s attention, %s, remat %s, on %d %s (data=%d, fsdp=%d)",
        config.name,
        f"{model.num_params:,}",
        model.attention,
        model.dtype,
        model.remat,
        len(devices),
        devices[0].device_kind,
        *mesh.devices.shape,
    )
    chosen_dense = config.model.attention == "auto" and model.attention == "xla"
    if chosen_dense and jax.default_backend() == "gpu":
        log.warning(
            "%s: no flash attention supports this model here: dense attention is slow, and its "
            "memory grows with seq_len squared",
            config.name,
        )


def open_run(
    config: ConfigDict,
    workdir: pathlib.Path,
    start: Start,
    task: Task,
    program: Program,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    checkpoints: checkpoint.Checkpoints,
    feed: Feed,
) -> tuple[Run, dict[str, Any]]:
    """The run at its first step, and `positions` of `initial_state`."""
    state, positions = initial_state(config, start, task, program, model, checkpoints, feed)
    record_start(config, model, workdir, start, mesh)
    run = Run(
        name=config.name,
        workdir=workdir,
        start_step=config.start_step,
        end_step=config.end_step,
        milestones=milestones(config.start_step, config.end_step, config.gates.perplexity),
        peak_lr=config.optimizer.peak_lr,
        origin=start.checkpoint,
        model=model,
        tokenizer=tokenizer,
        context_length=max(config.seq_len, start.context_length),
        mesh=mesh,
        rope_theta=program.rope_theta,
        checkpoints=checkpoints,
        watch=Watch(task.divergence_measure, model.vocab_size, start.lowest_loss),
        state=state,
        step=int(state.step),
    )
    return run, positions
