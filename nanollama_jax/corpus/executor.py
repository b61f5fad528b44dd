"""Runs the ranks of a datatrove pipeline on the cores of one machine, on Slurm or on Ray: the same blocks, another executor.

Ranks that are done are not run again. Each leaves LOGS/completions/RANK, LOGS/stats/RANK.json and LOGS/logs/task_RANK.log, which has
all that datatrove says: nothing of it is printed. With several machines, the repository, its Python environment, the sources and the
output lie on a file system that they share, under the same path.
"""

import contextlib
import dataclasses
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nanollama_jax.console import console
from nanollama_jax.errors import BadInput

KINDS = ("local", "slurm", "ray")
RAY_VERSION = "2.60.0"  # what tests run
_LINE_SECONDS = 10  # between plain lines, where there is no terminal for a bar
_ROOT = Path(__file__).parents[2]

# (documents, tokens, bytes) of each rank, in memory shared with the parent; None outside a worker of this machine
_counts: Any = None


@dataclasses.dataclass(frozen=True)
class Executor:
    """How the ranks of a pipeline are run. Raises `BadInput` for what cannot be."""

    kind: str = "local"  # or slurm, or ray
    workers: int = 0  # ranks at a time; 0: one on each core of this machine, or as many as the cluster has room for
    partition: str = ""  # slurm: `sinfo` lists them
    time: str = "24:00:00"  # slurm: limit for one rank
    memory_gb: int = 4  # slurm: for one rank, which has one core

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"executor {self.kind!r} is unknown: there are {', '.join(KINDS)}")
        if self.workers < 0:
            raise BadInput(
                f"workers={self.workers} must be at least 1, or 0 for as many as there is room for"
            )
        if self.kind == "slurm" and not self.partition:
            raise BadInput("executor slurm needs a partition: `sinfo` lists them")


def run_ranks(
    blocks: list[PipelineStep], executor: Executor, *, name: str, tasks: int, logs: Path
) -> bool:
    """Runs those of the `tasks` ranks that are not done yet, and shows how far they are.

    True when all are done; False when Slurm has been given the job, or has it still: a line says so, and what to do when it has ended.
    Raises `BadInput` if a rank failed on Ray, a worker was killed, or for Ctrl-C; on this machine, what a rank raised, at once.
    """
    logger.disable("datatrove")  # what this process would narrate
    if not _incomplete(tasks, logs):
        return True
    if job := _queued_slurm_job(logs):
        console.print(
            f"{name}: Slurm job {job} is not over yet (squeue --jobs={job}): run the same command again when it is"
        )
        return False
    try:
        if executor.kind == "slurm":
            _submit_to_slurm(blocks, executor, name, tasks, logs)
            return False
        with show_progress(name, tasks) as on_progress:
            if executor.kind == "ray":
                with _ray_cluster(executor.workers):
                    RayExecutor(
                        blocks,
                        tasks=tasks,
                        workers=executor.workers or tasks,
                        logging_dir=str(logs),
                    ).run(on_progress)
            else:
                PoolExecutor(
                    blocks, tasks=tasks, workers=executor.workers or cores(), logging_dir=str(logs)
                ).run(on_progress)
    except BrokenProcessPool as error:
        raise BadInput(
            f"a worker preparing {name} was killed (out of memory?): run the same command to go on from there"
        ) from error
    except KeyboardInterrupt as error:
        raise BadInput("stopped; run the same command to go on") from error
    if failed := _incomplete(tasks, logs):
        raise BadInput(
            f"{name}: {_describe_failures(failed, logs)}: mend that, and the same command redoes what failed, alone"
        )
    return True


def cores() -> int:
    """How many this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # macOS has no affinity


def _incomplete(tasks: int, logs: Path) -> list[int]:
    return [rank for rank in range(tasks) if not (logs / "completions" / f"{rank:05d}").exists()]


def _describe_failures(ranks: Sequence[int], logs: Path) -> str:
    rank, more = ranks[0], f", and so did {len(ranks) - 1} more" if len(ranks) > 1 else ""
    log = logs / "logs" / f"task_{rank:05d}.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    reason = "it was killed (out of memory, or time?), or never begun"
    if any(
        " | ERROR " in line for line in lines
    ):  # a traceback follows, and the exception is its last line
        reason = next(line for line in reversed(lines) if line.strip()).removeprefix(
            f"{BadInput.__module__}.BadInput: "
        )
    return f"rank {rank} failed{more}: {reason} ({log})"


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))


@contextlib.contextmanager
def show_progress(name: str, ranks: int) -> Iterator[Callable[..., None]]:
    """Yields an `on_progress` that moves a bar on a terminal, and prints a line now and then elsewhere."""
    start = last_line = time.monotonic()
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=ranks, state="")

        def on_progress(ranks_done: int, counts: np.ndarray | None = None) -> None:
            nonlocal last_line
            now = time.monotonic()
            state = f"{ranks_done}/{ranks} ranks"
            if counts is not None:
                documents, tokens, text_bytes = counts.tolist()
                state += f", {documents:,} documents, {f'{tokens:,} tokens, ' if tokens else ''}{text_bytes / 1e6 / (now - start):.1f} MB/s"
            bar.update(task, completed=ranks_done, state=state)
            if not console.is_terminal and (
                ranks_done == ranks or now - last_line >= _LINE_SECONDS
            ):
                last_line = now
                console.print(f"{name}: {state}, {now - start:.0f} s")

        yield on_progress


# One machine


def report_progress(rank: int, counts: Sequence[int]) -> None:
    """Called by a pipeline block: the (documents, tokens, bytes) that `rank` has dealt with."""
    if _counts is not None:
        _counts[3 * rank : 3 * rank + 3] = counts


class PoolExecutor(LocalPipelineExecutor):
    """datatrove's local executor, but a killed worker is an error, not a wait without end, and a failure stops all ranks at once."""

    def run(self, on_progress: Callable[[int, np.ndarray], None]) -> None:
        """Runs the ranks that are not done yet. `on_progress` hears how many are, and this run's [documents, tokens, bytes].

        Raises what a rank raised; `BrokenProcessPool` if a worker was killed.
        """
        self.save_executor_as_json()
        context = _worker_context()
        counts = context.RawArray("q", 3 * self.tasks)
        stop, hold = context.Pipe(duplex=False)
        ranks = self.get_incomplete_ranks()
        pool = ProcessPoolExecutor(
            max(1, min(self.workers, len(ranks))), context, _start_worker, (counts, stop)
        )
        with hold, pool:
            try:
                pending = {pool.submit(_run_rank, self, rank) for rank in ranks}
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    on_progress(self.tasks - len(pending), np.array(counts).reshape(-1, 3).sum(0))
            except BaseException:
                hold.close()
                raise


def _worker_context() -> Any:
    """Workers are forks of a server that has imported, once, what they need: forks of this process would get its threads, and the GPU it opened."""
    if sys.platform == "darwin":  # whose own libraries do not bear a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanollama_jax.corpus.prepare"])
    first = context.Process(
        target=int
    )  # does nothing; that it was started tells that the server is ready
    python_path = os.environ.get("PYTHONPATH")
    multiprocessing.resource_tracker.ensure_running()  # the server would start it, and that unblocks the signal again
    mask = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT}
    )  # inherited: Ctrl-C while it imports would print a traceback
    os.environ["PYTHONPATH"] = (
        _python_path()
    )  # sys.path is not inherited, and what it does not find it passes over
    try:
        first.start()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({} if python_path is None else {"PYTHONPATH": python_path})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    first.join()
    return context


def _start_worker(counts: Any, stop: multiprocessing.connection.Connection) -> None:
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops us
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  datatrove logs to it; errors reach the parent as exceptions

    def exit_with_parent() -> None:
        # The pipe ends when the parent closes it or dies, even by kill -9: a worker that outlived it would write into its successor's shards.
        multiprocessing.connection.wait([stop])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_rank(executor: PoolExecutor, rank: int) -> None:
    try:
        executor._run_for_rank(rank, rank)
    except (BadInput, OSError):
        raise
    except Exception as error:  # one that cannot be pickled and built again would break the pool, as if the worker had been killed
        raise RuntimeError(repr(error)) from error


# Ray


@contextlib.contextmanager
def _ray_cluster(workers: int) -> Iterator[None]:
    """Connects to the cluster at RAY_ADDRESS, or starts one on this machine and stops it afterwards."""
    try:
        import ray
    except ImportError as error:
        raise BadInput(f"executor ray needs Ray: pip install ray=={RAY_VERSION}") from error
    address = os.environ.get("RAY_ADDRESS")
    start = {"address": "local", "num_cpus": workers or cores(), "include_dashboard": False}
    os.environ.setdefault(
        "RAY_USAGE_STATS_ENABLED", "0"
    )  # a cluster that we start would send some to Ray's makers
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdigit():  # ray.init tries in vain for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        environment = {"env_vars": {"PYTHONPATH": _python_path()}}
        ray.init(
            **({"address": address} if address else start),
            runtime_env=environment,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise BadInput(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start it (ray start --head), or unset RAY_ADDRESS"
        ) from error
    ray._private.worker._worker_logs_enabled = (
        False  # without this, and in spite of log_to_driver, it prints that a worker died
    )
    try:
        yield
    finally:
        ray.shutdown()


class RayExecutor(RayPipelineExecutor):
    """datatrove's Ray executor, but a rank is a plain Ray task: datatrove's run() has actors that fork a pool each, and waits without end
    for a child that was killed. Ranks fail alone: the others go on."""

    _run_for_rank = PipelineExecutor._run_for_rank  # RayPipelineExecutor's own keeps logs of all corpora in one temporary folder until a rank ends

    def run(self, on_progress: Callable[[int], None]) -> None:
        """Runs the ranks that are not done yet. `on_progress` hears how many are. Why others failed is in their logs."""
        import ray

        self.save_executor_as_json()
        ranks, pending = self.get_incomplete_ranks(), {}
        done = self.tasks - len(ranks)
        task = ray.remote(num_cpus=1, max_retries=0)(
            _run_rank_under_ray
        )  # a retry could begin while the first is still writing
        executor = ray.put(self)
        while ranks or pending:
            while ranks and len(pending) < self.workers:
                rank = ranks.pop(0)
                pending[task.remote(executor, rank, os.getcwd())] = rank
            for reference in ray.wait(list(pending), timeout=1)[0]:
                rank = pending.pop(reference)
                try:
                    ray.get(reference)
                    done += 1
                except ray.exceptions.RayError as error:  # what a rank raised is in its log; not that it was killed, or could not begin
                    with self.logging_dir.open(f"logs/task_{rank:05d}.log", "a") as log:
                        log.write(f"Ray | ERROR | rank {rank}\n{error}\n")
            on_progress(done)


def _run_rank_under_ray(executor: RayExecutor, rank: int, directory: str) -> None:
    os.chdir(directory)  # where paths of the blocks are relative to
    executor._run_for_rank(rank, rank)


# Slurm


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's Slurm executor without its second job, which would only add up the stats."""

    def launch_merge_stats(self) -> None:
        pass


def _queued_slurm_job(logs: Path) -> str | None:
    """The Slurm job that was given these ranks, if it still waits or runs."""
    if not (record := logs / "slurm_job").exists():
        return None
    job = record.read_text()
    if not shutil.which("squeue"):
        raise BadInput(
            f"Slurm job {job} was given these ranks, and no squeue here tells whether it is over: if so, remove {record}"
        )
    answer = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True
    )
    if (
        answer.returncode and "Invalid job id" not in answer.stderr
    ):  # which it says of jobs that were over minutes ago
        raise BadInput(
            f"squeue does not tell whether job {job} is over: {answer.stderr.strip()}: try again later"
        )
    return job if answer.stdout.strip() else None


def _submit_to_slurm(
    blocks: list[PipelineStep], executor: Executor, name: str, tasks: int, logs: Path
) -> None:
    if not shutil.which("sbatch"):
        raise BadInput(
            "executor slurm: there is no sbatch here: run this on a login node of the cluster, or choose another executor"
        )
    if len(str(logs.absolute()).split()) > 1:
        raise BadInput(
            f"executor slurm: a job script cannot have the space in {logs.absolute()}: choose another directory"
        )
    ranks = _incomplete(tasks, logs)
    if (record := logs / "slurm_job").exists():
        console.print(f"{name}: {_describe_failures(ranks, logs)}")
    job = SlurmExecutor(
        blocks,
        tasks=tasks,
        workers=executor.workers or -1,
        time=executor.time,
        partition=executor.partition,
        qos=None,
        mem_per_cpu_gb=executor.memory_gb,
        job_name=f"prepare_{name}",
        logging_dir=str(logs.absolute()),
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH PYTHONPATH={shlex.quote(_python_path())}",
    )
    try:
        job.launch_job()
    except subprocess.CalledProcessError as error:
        raise BadInput(
            f"sbatch refused the job of {name} (exit status {error.returncode}): what it said stands above"
        ) from error
    record.write_text(job.job_id)
    console.print(
        f"{name}: submitted Slurm job {job.job_id} for {len(ranks)} of {tasks} ranks: when it has ended (squeue --jobs={job.job_id}), run the "
        "same command again: it redoes failed ranks alone, and completes the corpus"
    )
