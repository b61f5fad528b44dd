"""Signals that ask a run to stop. It finishes the current step, saves, and ends."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanollama_jax import process
from nanollama_jax.train.metrics import log

# SIGHUP: the terminal was closed. SIGUSR1, SIGUSR2, SIGXCPU: batch systems announce a time limit
# with them (Slurm's --signal, LSF, Grid Engine).
STOPPING = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[bool], bool]]:
    """Inside, a signal of `STOPPING` only sets a flag; a SIGINT after it ends the process at once.
    Yields a function that returns whether to stop.

    Several processes must all stop after the same step. The function asks the others if its
    argument is true, which must be the same on all.
    """
    received: signal.Signals | None = None
    logged = False

    def on_signal(number, frame):
        nonlocal received
        if received and number == signal.SIGINT:
            process.exit_interrupted()
        if not received and jax.process_index() == 0:
            process.say(
                f"received {signal.Signals(number).name}: saving and stopping; Ctrl-C ends it "
                "without saving"
            )
        received = signal.Signals(number)

    def stop_requested(ask_others: bool) -> bool:
        nonlocal logged
        if received and not logged:  # not in the handler: the log may be what it interrupts
            log.info("received %s", received.name)
            logged = True
        if jax.process_count() == 1:
            return received is not None
        return ask_others and bool(
            np.any(multihost_utils.process_allgather(np.array(received is not None)))
        )

    # nohup ignores SIGHUP: the run is meant to outlive its terminal
    numbers = [
        number
        for number in STOPPING
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
