"""Several processes: wrong flags, disagreement, and how the end of one ends the others."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from nanollama_jax import distributed
from nanollama_jax.errors import BadInput
from tests.conftest import ROOT

# Computes with the others, and after some steps does what its last argument says.
PROGRAM = """
import os, signal, sys
from nanollama_jax import distributed
from nanollama_jax.errors import BadInput, one_line_errors

def main(coordinator, count, process, then):
    with one_line_errors(), distributed.joined(coordinator, count, process):
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        process = jax.process_index()
        distributed.check_agreement({"config": {"theta": float("nan")}})
        for step in range(50 if then == "finish" else 10**9):
            gathered = multihost_utils.process_allgather(np.array(process))
            if step == 20 and then == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 20 and then == "bad input":
                raise BadInput("shard 7 is damaged: prepare it again")
            if step == 20 and then == "bug":
                raise ZeroDivisionError("0 tokens")
        print("gathered", gathered.tolist())

try:
    coordinator, count, process, then = sys.argv[1:]
    main(coordinator, int(count) if count else None, int(process) if process else None, then)
except BaseException as error:
    distributed.leave(error)
    raise
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(*then: str, environments: list[dict[str, str]] | None = None):
    """(exit status, stdout, stderr) of one process for each of `then`, started together."""
    coordinator, processes = f"localhost:{free_port()}", []
    for i, what in enumerate(then):
        flags = [coordinator, str(len(then)), str(i)]
        extra = environments[i] if environments else {}
        if "SLURM_PROCID" in extra:
            flags = ["auto", "", ""]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *flags, what],
                cwd=ROOT,
                env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | extra,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("localhost:1234", None, None), "without --num_processes and --process_id"),
        ((None, 2, 0), "without --coordinator=HOST:PORT"),
        ((None, None, 0), "without --coordinator=HOST:PORT and --num_processes"),
        (("localhost:1234", 2, 5), "the last one is 1"),
        (("localhost:1234", 2, 2), "the last one is 1"),
        (("localhost:1234", 2, -1), "the first process is 0"),
        (("localhost:1234", 0, 0), "--num_processes=0: at least 1"),
        (("localhost", 2, 0), "HOST:PORT"),
        (("", 2, 0), "HOST:PORT"),
        ((":1234", 2, 0), "HOST:PORT"),
        (("localhost:http", 2, 0), "HOST:PORT"),
        (("localhost:99999", 2, 1), "1 to 65535"),
        (("localhost:0", 2, 0), "1 to 65535"),
        (("no-such-host.invalid:1234", 2, 0), "no address for no-such-host.invalid"),
        (("no-such-host.invalid:1234", 2, 1), "no address for no-such-host.invalid"),
        (("a..b:1234", 2, 1), "no address for a..b"),
        (("auto", 2, 0), "without --num_processes"),
        (("auto", None, None), "not a Slurm or Open MPI job"),
    ],
)
def test_flags_that_cannot_be(flags, says, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "KUBERNETES_")):
            monkeypatch.delenv(name)
    with pytest.raises(BadInput, match=says), distributed.joined(*flags):
        pass


def test_one_process_needs_no_flags():
    with distributed.joined(None, None, None):
        distributed.check_agreement({"seed": 1})


def refused(port: int, process_id: int, monkeypatch, count: int = 3) -> str:
    monkeypatch.setattr(distributed, "_links", None)
    with (
        pytest.raises(BadInput) as caught,
        distributed.joined(f"localhost:{port}", count, process_id),
    ):
        pass
    return str(caught.value)


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        said = refused(port, 0, monkeypatch)
    assert f"cannot open port {port}" in said and "choose another" in said


def test_another_program_has_the_port(monkeypatch):
    with socket.create_server(("localhost", 0)) as server:

        def answer():
            connection = server.accept()[0]
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        assert "is not process 0" in refused(server.getsockname()[1], 1, monkeypatch)


def test_the_others_do_not_come(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "CONNECT_S", 6)
    port = free_port()
    assert "for process 1, 2 of 3 at" in refused(port, 0, monkeypatch)
    assert f"waiting for process 1, 2 of 3 at localhost:{port}" in capsys.readouterr().out
    monkeypatch.setattr(distributed, "CONNECT_S", 0.2)
    assert "for process 0 at" in refused(free_port(), 1, monkeypatch)


def test_two_with_the_same_id_or_another_number(monkeypatch):
    for hellos, says in (
        ([(1, 3), (1, 3)], "two processes have --process_id=1"),
        ([(1, 2)], "--num_processes=2 on process 1, 3 on process 0"),
    ):
        port = free_port()
        first = distributed.Links("localhost", port, 3, 0)
        first.listen()
        socket.create_connection(("localhost", port)).sendall(b"GET / HTTP/1.1\r\n")  # no matter
        for process, count in hellos[:-1]:
            distributed.Links("localhost", port, count, process).connect()
        process, count = hellos[-1]
        with pytest.raises(BadInput, match=says):
            distributed.Links("localhost", port, count, process).connect()
        with pytest.raises(BadInput, match=says):
            first.receive("process 1, 2", 5)


def test_one_that_has_nothing_left_to_do():
    port = free_port()
    first = distributed.Links("localhost", port, 2, 0)
    first.listen()
    other = distributed.Links("localhost", port, 2, 1)
    other.connect()
    other.send({"finished": True})
    with pytest.raises(BadInput, match="process 1 has nothing left to do"):
        first.receive("process 1", 5)


def test_what_differs_is_named_with_both_values():
    nan = float("nan")
    ours = {"config": {"seed": 1337, "nan": nan, "model": {"d": 8}}, "data": {"docs": "ab"}}
    theirs = {"config": {"seed": 5, "nan": nan, "model": {"d": 9}}}
    theirs["data"] = {"docs": "ab", "c": "d"}
    assert not distributed.difference(distributed.flat(ours), distributed.flat(ours), 1)
    said = distributed.difference(distributed.flat(ours), distributed.flat(theirs), 3)
    assert "config.model.d is 8 on process 0 and 9 on process 3 (config.seed, data.c too)" in said
    del theirs["data"], theirs["config"]["model"]
    theirs["config"]["seed"] = 1337
    said = distributed.difference(distributed.flat(ours), distributed.flat(theirs), 1)
    assert "config.model.d is 8 on process 0 and absent on process 1 (data.docs too)" in said


def test_other_compiler_flags_on_one():
    found = run("go on", "go on", environments=[{}, {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}])
    for status, _, err in found:
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert "the processes disagree: XLA_FLAGS is " in err


def test_slurm_and_a_proxy_in_the_environment():
    """gRPC asks a proxy for whatever no_proxy does not name: jax alone hangs here."""
    shared = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }
    each = [shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    for status, out, err in run("finish", "finish", environments=each):
        assert status == 0 and "gathered [0, 1]" in out and not err, err


@pytest.mark.parametrize(("dies", "count"), [(0, 2), (2, 3)])
def test_a_killed_process_ends_the_others_with_one_line(dies, count):
    found = run(*("die" if i == dies else "go on" for i in range(count)))
    assert found.pop(dies)[0] == -signal.SIGKILL
    for status, _, err in found:
        assert status == 1 and err.startswith(f"error: process {dies} of {count} is gone"), err
        assert "rerun the same command" in err and err.count("\n") == 1, err


def test_bad_input_on_one_ends_the_other():
    (status, _, err), (own, _, said) = run("go on", "bad input")
    assert status == own == 2 and said == "error: shard 7 is damaged: prepare it again\n"
    assert err == "error: process 1 of 2 stopped: shard 7 is damaged: prepare it again\n"


def test_a_bug_keeps_its_traceback_and_ends_the_other():
    started = time.monotonic()
    (own, _, said), (status, _, err) = run("bug", "go on")
    assert own == 1 and said.count("Traceback") == 1 and said.endswith("0 tokens\n")
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("error: process 0 of 2 stopped: ZeroDivisionError: 0 tokens")
    assert time.monotonic() - started < 60
