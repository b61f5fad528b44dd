"""Runs a datatrove pipeline on the cores of one machine, shows how far it is, and fails rather than hangs."""

import contextlib
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

import numpy as np
from datatrove.executor.local import LocalPipelineExecutor
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nanollama_jax.errors import BadInput

_LINE_SECONDS = 10  # between plain lines, where there is no terminal for a bar

# (documents, tokens, bytes) of each rank, in memory shared with the parent; None outside a worker
_counts: Any = None


def report_progress(rank: int, counts: Sequence[int]) -> None:
    """Called by a pipeline block: the (documents, tokens, bytes) that `rank` has dealt with."""
    if _counts is not None:
        _counts[3 * rank : 3 * rank + 3] = counts


class PoolExecutor(LocalPipelineExecutor):
    """datatrove's local executor, but a killed worker is an error, not a wait without end; a failure stops all ranks at once; and
    nothing is printed: datatrove's own report goes to LOGGING_DIR/logs/task_RANK.log."""

    def run(self, on_progress: Callable[[int, np.ndarray], None]) -> None:
        """Runs the ranks that are not done yet. `on_progress` hears how many are, and this run's [documents, tokens, bytes].

        Raises what a rank raised; `BrokenProcessPool` if a worker was killed.
        """
        self.save_executor_as_json()
        context = multiprocessing.get_context("spawn")  # the caller may have threads, or a GPU open
        counts = context.RawArray("q", 3 * self.tasks)
        stop, hold = context.Pipe(duplex=False)
        ranks = self.get_incomplete_ranks()
        pool = ProcessPoolExecutor(max(1, min(self.workers, len(ranks))), context, _start_worker, (counts, stop))
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


def _start_worker(counts: Any, stop: multiprocessing.connection.Connection) -> None:
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops us
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  datatrove logs to it; errors reach the parent as exceptions

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


@contextlib.contextmanager
def show_progress(name: str, ranks: int) -> Iterator[Callable[[int, np.ndarray], None]]:
    """Yields an `on_progress` that moves a bar on a terminal, and prints a line now and then elsewhere."""
    console = Console()
    start = last_line = time.monotonic()
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=ranks, state="")

        def on_progress(ranks_done: int, counts: np.ndarray) -> None:
            nonlocal last_line
            documents, tokens, text_bytes = counts.tolist()
            now = time.monotonic()
            state = f"{ranks_done}/{ranks} ranks, {documents:,} documents, {tokens:,} tokens, {text_bytes / 1e6 / (now - start):.1f} MB/s"
            bar.update(task, completed=ranks_done, state=state)
            if not console.is_terminal and (ranks_done == ranks or now - last_line >= _LINE_SECONDS):
                last_line = now
                print(f"{name}: {state}, {now - start:.0f} s", flush=True)

        yield on_progress
