"""The training loop: runs one stage of a curriculum to its last step, from wherever it stands.

Tasks (train/tasks) define what is trained; hooks (train/hooks) do what happens between steps.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from nanollama_jax import distributed, sharding
from nanollama_jax.checkpoint import Checkpoints
from nanollama_jax.checkpoint.origin import kept_windows
from nanollama_jax.config import check_workdir
from nanollama_jax.data import pipeline
from nanollama_jax.model.attention import check_attention
from nanollama_jax.train import hooks, provenance
from nanollama_jax.train import step as steps
from nanollama_jax.train.feed import open_tokenizer, show_row
from nanollama_jax.train.hooks import Hook, Run
from nanollama_jax.train.hooks.checkpointing import report_end
from nanollama_jax.train.meter import Meter
from nanollama_jax.train.metrics import log, open_reporter
from nanollama_jax.train.settle import settle
from nanollama_jax.train.signals import stop_signals
from nanollama_jax.train.start import claimed, find_start, open_run
from nanollama_jax.train.tasks import task_of


@dataclasses.dataclass(frozen=True)
class Outcome:
    step: int
    finished: bool  # False: a signal stopped it, after a checkpoint


def train(config: ConfigDict, workdir: str | pathlib.Path) -> Outcome:
    """Trains one stage. Raises BadInput, before anything is allocated, for settings or data that
    cannot work, and RunStopped if a gate stops the run or it diverges."""
    with contextlib.ExitStack() as cleanup:
        # ---- Resolve the config, claim the workdir
        task, model = task_of(config), settle(config)
        check_workdir(workdir)
        workdir = pathlib.Path(workdir)
        agreed = {"config": config.to_dict(), "model": dataclasses.asdict(model)}
        distributed.check_agreement(agreed | {"workdir": str(workdir.absolute())})
        cleanup.enter_context(claimed(workdir))

        # ---- Build the mesh
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        cleanup.enter_context(sharding.use_mesh(mesh))
        check_attention(model, rows=mesh.size)

        # ---- Open the data
        tokenizer = open_tokenizer(config.tokenizer.path, model.vocab_size)
        feed = task.open_data(config, tokenizer, kept_windows(workdir))
        cleanup.callback(feed.batches.close)

        # ---- Restore or initialise: the run's own checkpoint, config.init_from, scratch
        program = steps.program(config, model, mesh)
        start = find_start(config, workdir, model, task, tokenizer, feed)
        checkpoints = Checkpoints(
            workdir, config.checkpoint.keep_last, config.checkpoint.keep_every
        )
        cleanup.callback(checkpoints.close)
        run, read_before = open_run(
            config, workdir, start, task, program, model, mesh, tokenizer, checkpoints, feed
        )
        run.watch.start(run)
        resumed_from = start.metadata if start.resumed else None
        prepared = task.prepare(config, run, feed, program.state_shardings.params, resumed_from)
        about = provenance.describe(config, model, task, start, feed)
        attach = prepared.attach

        # ---- Compile
        run.reporter = open_reporter(
            config, task, workdir, model, mesh.devices, run.step if start.resumed else -1
        )
        cleanup.callback(run.reporter.close)
        run.stop_requested = cleanup.enter_context(stop_signals())
        started = time.monotonic()
        update = program.update.lower(program.state_shapes, program.batch_shapes).compile()
        log.info("%s: compiled in %.1f s", run.name, time.monotonic() - started)

        # ---- Train
        called = hooks.build(
            config,
            run,
            task.hooks(config) | dict(config.get("hooks", {})),
            measure=program.measure,
            batches={name: list(map(attach, found)) for name, found in feed.validation.items()},
            metadata=about | prepared.metadata,
            position=functools.partial(task.position, feed, read_before, config.seed),
            tokens_seen=start.tokens_seen,
        )
        run_steps(run, update, feed.batches, attach, called, config.log_every)

        # ---- Close: what is reported as saved is complete on disk
        report_end(run)
        return Outcome(step=run.step, finished=not run.stop)


def run_steps(
    run: Run,
    update: Callable,
    batches: Iterator[pipeline.Batch],
    attach: Callable[[pipeline.Batch], pipeline.Batch],
    called: list[Hook],
    log_every: int,
) -> None:
    """Runs steps up to the last one, or until the run is asked to stop. Metrics are fetched one
    step late, so that the device never waits for the host."""
    meter = Meter(run.reporter, run.watch)
    for hook in called:
        hook.start(run)
    run.stop, first = run.stop_requested(True), True
    meter.restart()
    while run.step < run.end_step and not run.stop:
        # ---- Next batch
        with meter.waiting_for_data():
            batch = next(batches)
        if first:
            log.info("%s: first row: %s", run.name, show_row(batch, run.tokenizer))
            first = False

        # ---- Dispatch, and fetch the previous step's metrics
        state, step_metrics = update(run.state, sharding.put_batch(attach(batch), run.mesh))
        run.advance(state)
        merged = pipeline.merged_documents(batch, run.tokenizer.bos_id)
        of_batch = {"batch_crc32": zlib.crc32(batch["tokens"]), "merged_documents": merged}
        meter.take(run.step, step_metrics, of_batch)
        run.watch(run)

        # ---- Call the hooks that are due. One may ask to stop, which makes others due.
        run.stop = run.stop_requested(run.step % log_every == 0)
        if any(hook.due(run) for hook in called):
            meter.flush()
            for hook in called:
                if hook.due(run):
                    hook(run)
            meter.restart()
    meter.flush()
