"""Output that cannot be written never ends or blocks a process; Ctrl-C is one line at any time."""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from tests.conftest import ROOT

# Prints 200 KB, more than a pipe or a terminal holds; then tells on stderr that it went on.
PRINTS = """
import os, sys
from nanollama_jax import process
process.keep_output_from_failing()
import rich.console
console = rich.console.Console()
for i in range(2000):
    console.print("x" * 99, soft_wrap=True) if i % 2 else print("é" * 49 + "y")
with open(os.devnull) as file:
    assert file.fileno() > 2, "a file took the place of a closed stream"
sys.stdout.flush()
process.say("went on")
"""


def start(stdout, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PRINTS],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def went_on(process):
    assert process.communicate(timeout=30)[1] == "went on\n" and process.returncode == 0


def test_output_that_cannot_be_written_is_dropped():
    with open("/dev/full", "w") as full:
        went_on(start(full))
    went_on(start(None, preexec_fn=lambda: os.close(1)))
    read, write = os.pipe()
    os.close(read)
    went_on(start(write))
    os.close(write)


@pytest.mark.parametrize("made", [os.pipe, pty.openpty])
@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_does_not_read_holds_up_nothing(made, blocking):
    """As a terminal after Ctrl-S; and as a terminal that is closed then."""
    ours, theirs = made()
    os.set_blocking(theirs, blocking)
    try:
        went_on(start(theirs))
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_slow_reader_gets_everything():
    process = start(subprocess.PIPE)
    lines = [process.stdout.readline() for _ in range(10)]
    time.sleep(0.2)
    lines += process.stdout.readlines()
    assert lines == ["é" * 49 + "y\n", "x" * 99 + "\n"] * 1000
    went_on(process)


def test_a_terminal_stays_one():
    ours, theirs = pty.openpty()
    shows = (
        "from nanollama_jax import process; process.keep_output_from_failing(); "
        "import rich.console; print(rich.console.Console().is_terminal)"
    )
    subprocess.run(
        [sys.executable, "-c", shows],
        cwd=ROOT,
        stdout=theirs,
        check=True,
        env=os.environ | {"TERM": "xterm"},
    )
    assert (
        rich.console.Console(file=os.fdopen(theirs, "w")).is_terminal
        and os.read(ours, 100) == b"True\r\n"
    )
    os.close(ours)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("library", ["jaxlib", "tensorstore"])
def test_ctrl_c_before_training_is_one_line(tmp_path, library):
    """Without it, an exception in the middle of jaxlib's import ends in a segmentation fault.

    So does a shutdown while other threads run.
    """
    command = [
        sys.executable,
        "main.py",
        "--config",
        "configs/phase1.py:nano",
        "--workdir",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted; saved files are intact\n"), out
