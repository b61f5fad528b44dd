"""The training loop: one stage of a curriculum, from wherever it stands to its last step. It reads as one page, in named sections;
the functions below it are its paragraphs.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from nanollama_jax import checkpoint, distributed, sharding
from nanollama_jax.checkpoint.origin import (
    check_changes,
    find_origin,
    initial_params,
    kept_windows,
    reload_initial_params,
    write_config,
)
from nanollama_jax.config import check_workdir
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput, RunStopped
from nanollama_jax.files import locked
from nanollama_jax.infer import samples
from nanollama_jax.infer.engine import Engine
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.attention import check_attention
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train import divergence, gates, metrics, optimizer
from nanollama_jax.train import step as steps
from nanollama_jax.train.feed import open_feed
from nanollama_jax.train.metrics import log
from nanollama_jax.train.objectives import means
from nanollama_jax.train.reference import open_reference
from nanollama_jax.train.settle import settle
from nanollama_jax.train.signals import stop_signals


@dataclasses.dataclass(frozen=True)
class Outcome:
    step: int
    finished: bool  # False: stopped by a signal, after a checkpoint


def train(config: ConfigDict, workdir: str | pathlib.Path) -> Outcome:
    """Trains one stage. Raises BadInput before anything is allocated if something is wrong, RunStopped when a gate says so or it diverges."""
    with contextlib.ExitStack() as cleanup:
        # ---- Settle the config and the workdir
        model = settle(config)
        check_workdir(workdir)
        workdir = pathlib.Path(workdir)
        if checkpoint.is_checkpoint(workdir.absolute()):
            raise BadInput(
                f"--workdir={workdir} is a checkpoint: name its run, {workdir.absolute().parent.parent}, or another folder"
            )
        distributed.check_agreement(
            {
                "config": config.to_dict(),
                "model": dataclasses.asdict(model),
                "workdir": str(workdir.absolute()),
            }
        )
        workdir.mkdir(parents=True, exist_ok=True)
        is_main = jax.process_index() == 0
        if is_main:
            # Two runs in one workdir would overwrite each other's checkpoints.
            cleanup.enter_context(
                locked(
                    workdir / ".lock",
                    f"another run is at work in {workdir}: wait for it, or choose another --workdir",
                )
            )
        metrics.set_up_logging(workdir, is_main)

        # ---- Build the mesh, and see that attention is right on it
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        cleanup.enter_context(sharding.use_mesh(mesh))
        check_attention(model, rows=mesh.size)
        if (
            config.model.attention == "auto"
            and model.attention == "xla"
            and jax.default_backend() == "gpu"
        ):
            log.warning(
                "%s: no flash attention for this model here: it is dense, slow, and its memory grows with seq_len squared",
                config.name,
            )

        # ---- Open the data
        tokenizer = Tokenizer(config.tokenizer.path)
        if tokenizer.vocab_size != model.vocab_size:
            raise BadInput(
                f"{config.tokenizer.path} has {tokenizer.vocab_size} pieces and model.vocab_size={model.vocab_size}: make them agree"
            )
        feed = open_feed(config, tokenizer, kept_windows(workdir))
        batches, tuning = feed.batches, config.task != "pretrain"
        cleanup.callback(batches.close)

        # ---- Shape the state (nothing is allocated yet)
        program = steps.program(config, model, mesh)
        shapes, shardings, rope_theta = (
            program.state_shapes,
            program.state_shardings,
            program.rope_theta,
        )

        # ---- Restore or initialise: the run's own latest checkpoint, config.init_from, scratch
        about_data = {
            "tokenizer_sha256": tokenizer.sha256,
            "data_sha256": pipeline.fingerprint({k: feed.sources[k] for k in config.data.sources}),
        }
        origin, origin_step = find_origin(config, workdir, model, about_data)
        distributed.check_agreement(
            {
                "tokenizer": tokenizer.sha256,
                "data": {
                    name: pipeline.fingerprint({name: source})
                    for name, source in feed.sources.items()
                },
                "start": f"{origin} at step {origin_step}",
            }
        )
        before = checkpoint.read_metadata(origin, origin_step) if origin else None
        inherited = {
            "context_length": max(config.seq_len, before.context_length if before else 0),
            "provenance": before.provenance if before else None,
        }
        if tuning and origin != workdir:
            inherited["provenance"] = checkpoint.provenance(before)
        if feed.shuffle_windows:
            inherited["shuffle_windows"] = feed.shuffle_windows
        # Fine-tuning counts its own tokens, as it does its steps; those of the base model are in `provenance`.
        tokens_before = (
            0 if before is None or (tuning and origin != workdir) else before.tokens_seen
        )
        if tokens_before:
            how = (
                ""
                if before.tokens_seen_is_exact
                else ", as an earlier version reckoned them: all steps as if they had this stage's tokens"
            )
            log.info(
                "%s: %s tokens seen up to step %d%s",
                config.name,
                f"{tokens_before:,}",
                origin_step,
                how,
            )
        if origin == workdir and (
            changed := check_changes(
                before.config,
                json.loads(config.to_json_best_effort()),
                origin_step,
                optimizer.schedules,
            )
        ):
            log.warning("%s: %s", config.name, changed)
        named = (
            config.tuning if tuning else config.corpora
        )  # a licence stated now, else the one prepared with
        read = {
            name: named.get(name, {}).get("licence") or feed.sources[name].manifest["licence"]
            for name in config.data.sources
        }
        inherited["corpora"] = (before.corpora if before and not tuning else {}) | read
        checkpoints = checkpoint.Checkpoints(
            workdir, config.checkpoint.keep_last, config.checkpoint.keep_every
        )
        cleanup.callback(checkpoints.close)
        read_before = {}  # source -> where earlier stages left it
        if origin is None:
            (workdir / "gates.json").unlink(missing_ok=True)
            state = program.make_state()
        elif origin == workdir:
            state, data = checkpoints.restore(origin_step, shapes, shardings)
            read_before = data["positions"]
            batches.set_state(data["batches"])
        elif tuning or before.weights_only:
            params = initial_params(origin, origin_step, model)
            state = program.make_state().replace(params=jax.device_put(params, shardings.params))
        else:
            with contextlib.closing(checkpoint.Checkpoints(origin, read_only=True)) as other:
                state, data = other.restore(origin_step, shapes, shardings)
            read_before = data["positions"]
            position, anew = pipeline.resume_at(
                batches.get_state(), read_before, feed.sources, config.seed
            )
            batches.set_state(position)
            if anew:
                log.warning(
                    "%s: read from their beginning, for the seed or the corpus is another than before: %s",
                    config.name,
                    ", ".join(anew),
                )
        if is_main:
            settled = ConfigDict(config.to_dict() | {"model": dataclasses.asdict(model)})
            write_config(
                workdir,
                settled.to_json_best_effort(indent=1).encode() + b"\n",
                origin_step if origin == workdir else None,
            )
        step = first_step = int(state.step)
        if origin is None:
            start = "from scratch"
        else:
            start = (
                f"resumed from {origin} at step {step}"
                if origin == workdir
                else f"from step {origin_step} of {origin}"
            )
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

        # ---- Refuse what is not finite, from here on to the end
        watch = divergence.Watch(
            config.task,
            model.vocab_size,
            before.lowest_loss if origin == workdir else {},
        )

        def diverged(why: str) -> NoReturn:
            suspect = (
                origin.absolute() / checkpoint.FOLDER / f"step_{origin_step}"
                if origin and not watch.good_steps
                else None
            )
            divergence.stop(
                f"{config.name}, step {step}: {why}", checkpoints, config.optimizer.peak_lr, suspect
            )

        if not divergence.is_finite(state):
            diverged("parameters or optimizer state are not finite")

        # ---- What fine-tuning needs besides: DPO's reference, prompts to sample
        reference = None
        if config.task == "dpo":
            resumed = origin == workdir

            def start():
                return (
                    jax.device_put(reload_initial_params(config.init_from, model), shardings.params)
                    if resumed
                    else state.params
                )

            known = before.reference_weights if resumed else None
            reference = open_reference(
                config, workdir, feed, known, start, model, float(rope_theta(step)), mesh
            )
            validation = {
                name: [reference.attach(batch) for batch in found]
                for name, found in feed.validation.items()
            }
            feed = dataclasses.replace(feed, validation=validation)
            inherited["reference_weights"] = reference.weights

        sampling = tuning and bool(config.samples.every and config.samples.prompts)
        if sampling and jax.process_count() > 1:
            log.info(
                "%s: no samples with several processes: an engine is one process's", config.name
            )
            sampling = False
        prompts = (
            samples.encode(config.samples.prompts, tokenizer, inherited["context_length"])
            if sampling
            else {}
        )

        # ---- Report and compile
        reporter = metrics.Reporter(
            config,
            workdir,
            step=step if origin == workdir else -1,
            flops_per_token=model.flops_per_token(config.seq_len),
            device_kind=devices[0].device_kind,
            devices=len(devices),
            is_main=is_main,
        )
        cleanup.callback(reporter.close)
        stop_requested = cleanup.enter_context(stop_signals())
        started = time.monotonic()
        update = program.update.lower(shapes, program.batch_shapes).compile()
        log.info("%s: compiled in %.1f s", config.name, time.monotonic() - started)

        # ---- Train: metrics are fetched one step late, so that the device never waits for the host
        meter = Meter(reporter, watch)

        def gate_limits(step: int) -> tuple[float, float] | None:
            """A gate at the step where a stage starts was the stage's before it."""
            return (
                gates.thresholds(config.gates.perplexity, step)
                if step > config.start_step
                else None
            )

        def validate() -> float | None:
            """The perplexity, or None where a signal cut it short."""
            theta, found = np.float32(rope_theta(step)), {}
            for name, batches in feed.validation.items():
                found[name] = measure_all(
                    program.measure,
                    state.params,
                    theta,
                    batches,
                    mesh,
                    lambda: stop_requested(True),
                )
                if found[name] is None:
                    return None
            # The stage's own figures are those of its mix: means weighted by share of the rows
            shares = {
                name: share / sum(config.data.sources.values())
                for name, share in config.data.sources.items()
                if name in found
            }
            found["all"] = {
                key: sum(share * found[name][key] for name, share in shares.items())
                / sum(shares.values())
                for key in next(iter(found.values()))
            }
            watch.validation(found["all"])
            if step == config.end_step and (why := watch.objection(state)):
                diverged(
                    why
                )  # before it is on record: a stage whose last validation is on record is finished
            reporter.validation(step, found)
            return float(np.exp(found["all"]["loss"]))

        def sample() -> None:
            engine = Engine(
                model,
                state.params,
                tokenizer,
                rope_theta=float(rope_theta(step)),
                context_length=inherited["context_length"],
                mesh=mesh,
            )
            for line in samples.lines(engine, prompts, config.samples.max_new_tokens):
                log.info("%s step %d  %s", config.name, step, line)

        def save(validation_loss: float | None) -> None:
            about = (
                describe(config, model, step, float(rope_theta(step)), about_data)
                | inherited
                | {"lowest_loss": watch.lowest}
            )
            about["tokens_seen"] = tokens_before + (step - first_step) * config.tokens_per_step
            position = batches.get_state()
            data = {
                "batches": position,
                "positions": {}
                if tuning
                else read_before | pipeline.positions(position, feed.sources, config.seed),
            }
            checkpoints.save(step, state, data, about, tokenizer.model_bytes, validation_loss)

        def pass_gate(perplexity: float | None) -> None:
            limits = gate_limits(step)
            if limits is None or gates.passed(workdir, step):
                return
            if (perplexity := validate() if perplexity is None else perplexity) is None:
                return
            decided = gates.verdict(perplexity, *limits)
            if is_main:
                gates.record(
                    workdir,
                    step,
                    "overridden" if decided == "stop" and not config.gates.enforce else decided,
                )
            text = f"gate at step {step}: validation perplexity {perplexity:.2f} (go below {limits[0]:g}, stop above {limits[1]:g}): {decided}"
            log.log({"go": 20, "caution": 30, "stop": 40}[decided], "%s", text)
            if decided == "stop" and config.gates.enforce:
                checkpoints.wait()
                raise RunStopped(
                    f"{text}. The run is saved; to go on all the same, run it again with --config.gates.enforce=False"
                )

        if step == 0 or (
            step == config.end_step and not metrics.validated_at(workdir / "metrics.jsonl", step)
        ):
            validate()
        pass_gate(None)  # one that held the run before
        stop = stop_requested(True)
        meter.restart()
        while step < config.end_step and not stop:
            with meter.waiting_for_data():
                batch = next(batches)
            if step == first_step:
                log.info("%s: first row: %s", config.name, show_row(batch, tokenizer))
            state, step_metrics = update(
                state, sharding.put_batch(reference.attach(batch) if reference else batch, mesh)
            )
            step += 1
            merged = pipeline.merged_documents(batch, tokenizer.bos_id)
            meter.take(
                step,
                step_metrics,
                {"batch_crc32": zlib.crc32(batch["tokens"]), "merged_documents": merged},
            )
            if watch.skipped_in_a_row >= divergence.MAX_SKIPPED_IN_A_ROW:
                diverged(watch.objection(state))

            stop = stop_requested(step % config.log_every == 0)
            at_gate = gate_limits(step) is not None
            to_validate = step % config.validation.every == 0 or step == config.end_step or at_gate
            to_save = (
                step % config.checkpoint.every == 0 or step == config.end_step or at_gate or stop
            )
            to_sample = (
                sampling
                and not stop
                and (step % config.samples.every == 0 or step == config.end_step)
            )
            if to_validate or to_save or to_sample:
                meter.flush()
                # In this order: what a checkpoint claims to have been validated is on record; a gate holds a run that is saved.
                perplexity = validate() if to_validate and not stop else None
                if to_validate and perplexity is None:
                    stop = to_save = True
                if to_save and (why := watch.objection(state)):
                    watch.not_saved_in_a_row += 1
                    if (
                        step == config.end_step
                        or at_gate
                        or watch.not_saved_in_a_row >= divergence.MAX_NOT_SAVED_IN_A_ROW
                    ):
                        diverged(why)
                    log.warning("%s: not saved at step %d: %s", config.name, step, why)
                elif to_save:
                    watch.not_saved_in_a_row = 0
                    save(None if perplexity is None else float(np.log(perplexity)))
                if to_sample and not stop:
                    sample()
                if perplexity is not None:
                    pass_gate(perplexity)
                meter.restart()

        # ---- Close: what is reported saved is whole on disk
        meter.flush()
        checkpoints.wait()
        saved = checkpoints.latest_step()
        if stop:
            kept = (
                "saved"
                if saved == step
                else f"nothing saved since step {saved}"
                if saved is not None
                else "nothing saved yet"
            )
            log.warning(
                "%s: stopped by a signal at step %d (%s); rerun the command to resume",
                config.name,
                step,
                kept,
            )
        else:
            log.info(
                "%s: finished at step %d and saved in %s",
                config.name,
                saved,
                checkpoints.directory / f"step_{saved}",
            )
        return Outcome(step=step, finished=not stop)


class Meter:
    """Fetches each step's metrics after the next one is dispatched, times them, and shows them to the reporter and the watch."""

    def __init__(self, reporter: metrics.Reporter, watch: divergence.Watch):
        self._reporter, self._watch = reporter, watch
        self._pending: tuple[int, dict[str, jax.Array], dict[str, int], float] | None = None
        self._data_seconds = 0.0
        self._warned: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """The clock starts again: validation and saving are not part of a step."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._data_seconds = time.monotonic() - started

    def take(self, step: int, step_metrics: dict[str, jax.Array], of_batch: dict[str, int]) -> None:
        pending, self._pending = self._pending, (step, step_metrics, of_batch, self._data_seconds)
        self._report(pending)

    def flush(self) -> None:
        pending, self._pending = self._pending, None
        self._report(pending)

    def _report(self, pending) -> None:
        if pending is None:
            return
        step, step_metrics, of_batch, data_seconds = pending
        values = {
            name: float(value) for name, value in jax.device_get(step_metrics).items()
        } | of_batch  # waits for the device
        now = time.monotonic()
        self._reporter.step(step, values, seconds=now - self._last, data_seconds=data_seconds)
        self._last = now
        for name, remedy in (
            ("merged_documents", "data.max_segments"),
            ("merged_in_attention", "model.packed_documents"),
        ):
            if values[name] and name not in self._warned:
                log.warning(
                    "step %d: %d documents are not kept apart from the one before: raise %s",
                    step,
                    values[name],
                    remedy,
                )
                self._warned.add(name)
        self._watch.step(step, values)


def measure_all(
    measure: Callable,
    params: Any,
    rope_theta: np.float32,
    batches: list[pipeline.Batch],
    mesh,
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """The objective's means over all batches, or None if it was to stop in their midst."""
    total: collections.Counter[str] = collections.Counter()
    for batch in batches:
        if stop_requested():
            return None
        sums = jax.device_get(measure(params, sharding.put_batch(batch, mesh), rope_theta))
        for name, value in sums.items():
            total[name] += float(value)
    return {name: float(value) for name, value in means(total).items()}


def describe(
    config: ConfigDict, model: ModelConfig, step: int, rope_theta: float, about_data: dict[str, str]
) -> dict[str, Any]:
    """The metadata of a checkpoint, but for `tokens_seen` and what it inherits."""
    return {
        "phase": config.name,
        "step": step,
        "model": dataclasses.asdict(model),
        "rope_theta": rope_theta,
        **about_data,
        "git_commit": git_commit(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece")
        },
        "config": json.loads(config.to_json_best_effort()),
    }


@functools.cache
def git_commit() -> str:
    if not shutil.which("git"):
        return "unknown: git is not installed"
    result = subprocess.run(
        ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown: not a git checkout"


def show_row(
    batch: pipeline.Batch, tokenizer: Tokenizer, documents: int = 3, characters: int = 120
) -> str:
    """What the model is fed: how many tokens of a row it learns, and the beginnings of the first
    documents as text, special tokens by name, control characters escaped."""
    tokens, segments = batch["tokens"][0], batch["segment_ids"][0]
    found = [tokens[segments == i].tolist() for i in range(1, segments.max() + 1)]
    found = [ids for ids in found if any(ids)]  # the rest of a row of conversations is padding
    learned = int(batch["loss_weights"][0].sum())
    texts = [repr(tokenizer.show(ids)[:characters]) for ids in found[:documents]]
    return f"{len(found)} segment(s), {learned:,} tokens learned: {' | '.join(texts)}"
