"""Signals that ask a run to stop."""

import os
import signal

import pytest

from nanollama_jax.train.signals import STOPPING, stop_signals


@pytest.fixture(autouse=True)
def default_hangup():
    """pytest itself may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
)
def test_a_signal_asks_to_stop(number, capfd):
    before = [signal.getsignal(each) for each in STOPPING]
    with stop_signals() as stop_requested:
        assert not stop_requested(True)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested(False)
    assert [signal.getsignal(each) for each in STOPPING] == before
    assert (
        capfd.readouterr().err
        == f"received {number.name}: saving and stopping; Ctrl-C ends it without saving\n"
    )


def test_sigint_after_another_signal_ends_at_once(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with stop_signals() as stop_requested:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested(False) and not ended
        os.kill(os.getpid(), signal.SIGINT)
    assert (
        ended == [130]
        and capfd.readouterr().err.splitlines()[-1] == "error: interrupted; saved files are intact"
    )


def test_nohup_stays_in_force():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as stop_requested:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop_requested(False)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
