"""Runs the ranks of a job, each exactly once: on the cores of this machine, on Ray, or as an array
of independent processes, such as a Slurm job array.

A job is a function `work(rank, ranks)`. What it returns is written to `LOGS/ranks/RANK.json` and
marks the rank as finished; a rank that failed leaves its traceback in `LOGS/ranks/RANK.log`.
Finished ranks never run again, and a rank runs in one process at a time. With several machines, the
repository, its Python environment, the sources and the output lie on a file system that they share,
under the same paths.
"""

import contextlib
import dataclasses
import json
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nanollama_jax.console import console
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked, write_json

KINDS = ("local", "ray")
RAY_VERSION = "2.60.0"  # the version that the tests run
_LINE_SECONDS = 10  # between progress lines when the output is not a terminal
_ROOT = Path(__file__).parents[2]

Work = Callable[[int, int], Any]
# Takes the number of finished ranks and, where known, [documents, tokens, bytes] so far.
OnProgress = Callable[[int, np.ndarray | None], None]

# Where `report_progress` sends its counts; None where nobody listens.
_report: Callable[[int, Sequence[int]], None] | None = None


@dataclasses.dataclass(frozen=True)
class Executor:
    """How the ranks of a job are run. Raises `BadInput` for settings that make no sense."""

    kind: str = "local"  # or "ray"
    workers: int = 0  # ranks at a time; 0: one per core, or as many as the cluster has room for
    num_ranks: int = 0  # > 0: that many processes share the ranks, see `run_ranks`
    rank: int | None = None  # of them, the number of this process; None: only set up the job

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"executor {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.workers < 0:
            raise BadInput(f"workers={self.workers} must be at least 1, or 0 to choose it here")
        if self.num_ranks < 0:
            raise BadInput(f"num_ranks={self.num_ranks} must be at least 1, or 0 for none")
        if self.rank is not None and not 0 <= self.rank < self.num_ranks:
            raise BadInput(f"rank={self.rank} must be at least 0 and below num_ranks")


def run_ranks(
    work: Work, executor: Executor, *, name: str, tasks: int, logs: Path
) -> list[Any] | None:
    """Runs those of ranks 0 to `tasks` - 1 that are not finished, and shows the progress.

    Returns what each rank returned, in order. With `executor.num_ranks`, returns None: process R
    runs ranks R, R + num_ranks, ... in turn, and a process without a rank runs nothing.
    A job of a single rank runs in this process. Raises `BadInput` if ranks failed on Ray, if a
    worker was killed, and for Ctrl-C; on this machine, what a rank raised, at once.
    """
    (logs / "ranks").mkdir(parents=True, exist_ok=True)
    ranks = unfinished_ranks(tasks, logs)
    try:
        if executor.num_ranks:
            if executor.rank is not None:
                for rank in range(executor.rank, tasks, executor.num_ranks):
                    _run_rank(work, rank, tasks, logs)
            return None
        if ranks and tasks == 1:
            _run_here(work, name, logs)
        elif ranks:
            with show_progress(name, tasks) as on_progress:
                run = _run_on_ray if executor.kind == "ray" else _run_on_cores
                run(work, ranks, tasks, executor.workers, logs, on_progress)
    except BrokenProcessPool as error:
        raise BadInput(
            f"a worker preparing {name} was killed (out of memory?): rerun the command to resume"
        ) from error
    except KeyboardInterrupt as error:
        raise BadInput("stopped; rerun the command to resume") from error
    if failed := unfinished_ranks(tasks, logs):
        raise BadInput(
            f"{name}: {_describe_failures(failed, logs)}: fix this and rerun; only the ranks that "
            "failed run again"
        )
    return [json.loads(_result(rank, logs).read_bytes()) for rank in range(tasks)]


def unfinished_ranks(tasks: int, logs: Path) -> list[int]:
    """The ranks that have not finished."""
    return [rank for rank in range(tasks) if not _result(rank, logs).exists()]


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def report_progress(rank: int, counts: Sequence[int]) -> None:
    """Called by a running rank: how many (documents, tokens, bytes) it has processed."""
    if _report is not None:
        _report(rank, counts)


def _result(rank: int, logs: Path) -> Path:
    return logs / "ranks" / f"{rank:05d}.json"


def _run_rank(work: Work, rank: int, tasks: int, logs: Path) -> None:
    """Runs a rank unless it is finished. Raises `BadInput` if another process is running it."""
    result = _result(rank, logs)
    log = result.with_suffix(".log")
    busy = f"rank {rank} of {logs} is running in another process: wait for it to end"
    with locked(result.with_suffix(".lock"), busy):
        if result.exists():
            return
        log.unlink(missing_ok=True)
        try:
            returned = work(rank, tasks)
        except Exception:
            log.write_text(traceback.format_exc(), encoding="utf-8")
            raise
        write_json(result, returned)


def _describe_failures(ranks: Sequence[int], logs: Path) -> str:
    rank, more = ranks[0], f", and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    log = _result(rank, logs).with_suffix(".log")
    reason = "it was killed (out of memory?), or never started"
    if log.exists():  # the exception is the last line of the traceback
        lines = log.read_text(encoding="utf-8").split("\n")
        last = next(line for line in reversed(lines) if line.strip())
        reason = last.removeprefix(f"{BadInput.__module__}.BadInput: ")
    return f"rank {rank} failed{more}: {reason} ({log})"


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))


@contextlib.contextmanager
def show_progress(name: str, ranks: int) -> Iterator[OnProgress]:
    """Yields an `on_progress` that moves a bar on a terminal and elsewhere prints a line now and
    then."""
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
                state += f", {documents:,} documents" + (f", {tokens:,} tokens" if tokens else "")
                state += f", {text_bytes / 1e6 / (now - start):.1f} MB/s"
            bar.update(task, completed=ranks_done, state=state)
            due = ranks_done == ranks or now - last_line >= _LINE_SECONDS
            if due and not console.is_terminal:
                last_line = now
                console.print(f"{name}: {state}, {now - start:.0f} s")

        yield on_progress


# One machine


def _run_here(work: Work, name: str, logs: Path) -> None:
    global _report
    with show_progress(name, 1) as on_progress:
        _report = lambda _, counts: on_progress(0, np.array(counts))  # noqa: E731
        try:
            _run_rank(work, 0, 1, logs)
        finally:
            _report = None


def _run_on_cores(
    work: Work,
    ranks: Sequence[int],
    tasks: int,
    workers: int,
    logs: Path,
    on_progress: OnProgress,
) -> None:
    """Raises what a rank raised, and stops the others; `BrokenProcessPool` if a worker died."""
    context = _worker_context()
    counts = context.RawArray("q", 3 * tasks)
    stop, hold = context.Pipe(duplex=False)
    workers = min(workers or cores(), len(ranks))
    pool = ProcessPoolExecutor(workers, context, _start_worker, (counts, stop))
    with hold, pool:
        try:
            pending = {pool.submit(_run_in_worker, work, rank, tasks, logs) for rank in ranks}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                on_progress(tasks - len(pending), np.array(counts).reshape(-1, 3).sum(0))
        except BaseException:
            hold.close()
            raise


def _worker_context() -> Any:
    """Workers are forks of a server that has imported, once, what they need.

    Forks of this process would inherit its threads and the GPU that it opened.
    """
    if sys.platform == "darwin":  # its system libraries do not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanollama_jax.corpus.prepare"])
    first = context.Process(target=int)  # does nothing; once it has started, the server is ready
    python_path = os.environ.get("PYTHONPATH")
    # The server would start the resource tracker, and that unblocks the signal again.
    multiprocessing.resource_tracker.ensure_running()
    # Inherited: without it, Ctrl-C during the server's imports would print a traceback.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # sys.path is not inherited, and the server ignores modules that it does not find.
    os.environ["PYTHONPATH"] = _python_path()
    try:
        first.start()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({} if python_path is None else {"PYTHONPATH": python_path})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    first.join()
    return context


def _start_worker(counts: Any, stop: multiprocessing.connection.Connection) -> None:
    global _report

    def report(rank: int, done: Sequence[int]) -> None:
        counts[3 * rank : 3 * rank + 3] = done

    def exit_with_parent() -> None:
        # The pipe ends when the parent closes it or dies, even by kill -9. A worker that outlived
        # its parent would keep a rank from being run again.
        multiprocessing.connection.wait([stop])
        os._exit(1)

    _report = report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and stops the workers
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_in_worker(work: Work, rank: int, tasks: int, logs: Path) -> None:
    try:
        _run_rank(work, rank, tasks, logs)
    except (BadInput, OSError):
        raise
    except Exception as error:
        # An exception that does not unpickle would break the pool, as if a worker had been killed.
        raise RuntimeError(repr(error)) from error


# Ray


@contextlib.contextmanager
def _ray_cluster(workers: int) -> Iterator[None]:
    """Connects to the cluster at RAY_ADDRESS, or starts one on this machine and stops it again."""
    try:
        import ray
    except ImportError as error:
        raise BadInput(f"executor ray needs Ray: pip install ray=={RAY_VERSION}") from error
    address = os.environ.get("RAY_ADDRESS")
    start = {"address": "local", "num_cpus": workers or cores(), "include_dashboard": False}
    # A cluster that we start would otherwise send usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdigit():  # ray.init would retry for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            **({"address": address} if address else start),
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise BadInput(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start one (ray start --head), or "
            "unset RAY_ADDRESS"
        ) from error
    # Despite log_to_driver, Ray prints that a worker died.
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()


def _run_on_ray(
    work: Work,
    ranks: Sequence[int],
    tasks: int,
    workers: int,
    logs: Path,
    on_progress: OnProgress,
) -> None:
    """Each rank is a Ray task. Ranks fail alone, and the others go on; their logs say why."""
    with _ray_cluster(workers):
        import ray

        # No retries: one could begin while the first attempt is still writing.
        task = ray.remote(num_cpus=1, max_retries=0)(_run_rank_in)
        shared, waiting, pending = ray.put(work), list(ranks), {}
        done = tasks - len(ranks)
        while waiting or pending:
            while waiting and len(pending) < (workers or tasks):
                rank = waiting.pop(0)
                arguments = (os.getcwd(), shared, rank, tasks, logs)
                pending[task.remote(*arguments)] = rank
            for reference in ray.wait(list(pending), timeout=1)[0]:
                log = _result(pending.pop(reference), logs).with_suffix(".log")
                try:
                    ray.get(reference)
                    done += 1
                except ray.exceptions.RayError as error:
                    if not log.exists():  # the rank raised nothing: it was killed, or not started
                        log.write_text(str(error), encoding="utf-8")
            on_progress(done, None)


def _run_rank_in(directory: str, work: Work, rank: int, tasks: int, logs: Path) -> None:
    os.chdir(directory)  # the paths in `work` may be relative
    _run_rank(work, rank, tasks, logs)
