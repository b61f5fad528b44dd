import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from nanollama_jax import files
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked, output_file, output_path, whole_file, write_json


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def cut_short():
        with whole_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cut_short()
    assert path.read_text() == '{\n "a": 1\n}\n' and list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path, host = tmp_path / "curves[1].png", socket.gethostname()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leftovers = [
        tmp_path / f".curves[1].png.{at}.tmp"
        for at in (f"{host}.{gone.pid}", f"{host}.1", f"elsewhere.{gone.pid}", f"{host}.x")
    ]
    leftovers.append(tmp_path / f".other.png.{host}.{gone.pid}.tmp")
    for file in leftovers:
        file.touch()
    with whole_file(path) as file:
        file.write(b"new")
    assert set(tmp_path.iterdir()) == {path, *leftovers[1:]}


def test_one_process_at_a_time(tmp_path):
    with (
        locked(tmp_path / "lock", "first"),
        pytest.raises(BadInput, match="second"),
        locked(tmp_path / "lock", "second"),
    ):
        pytest.fail("two are inside")
    with locked(tmp_path / "lock", "third"):
        pass


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step_5/state").mkdir(parents=True)
    (tmp_path / "step_5/_CHECKPOINT_METADATA").touch()
    monkeypatch.chdir(tmp_path)
    for path, message in (
        ("", "--out is empty"),
        ("file/x", "file is not a folder"),
        ("file/x/y", "file is not a folder"),
        ("dangling/x", "dangling is not a folder"),
        ("/dev/null", "is a device or a pipe"),
        ("/dev/null/x", "/dev/null is not a folder"),
        ("step_5/x", "is in the checkpoint"),
        ("step_5/state/new/x", "is in the checkpoint"),
    ):
        for check in (output_path, output_file):
            with pytest.raises(BadInput, match=message):
                check(path)
    for path in (".", "/", "step_5", str(tmp_path)):
        with pytest.raises(BadInput, match="is a folder: name a file in it"):
            output_file(path)
    for path in ("new", "new/and/more", "file", tmp_path / "new"):
        assert output_file(path) == output_path(path) == tmp_path / path
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(BadInput, match=f"--workdir {tmp_path}/new/x: {tmp_path} cannot be written"):
        output_path("new/x", "--workdir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "step_5"], (
        "nothing is made by looking"
    )


NO_FLOCK = """
import errno, fcntl, sys, time
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
from nanollama_jax.errors import one_line_errors
from nanollama_jax.files import locked
with one_line_errors(), locked(sys.argv[1], "it is at work"):
    print("inside", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", NO_FLOCK, str(path), str(seconds)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_locks_a_file_keeps_others_out_until_it_ends_or_is_killed(tmp_path):
    path, held = tmp_path / "lock", tmp_path / "lock.held"
    first = start(path, 60)
    assert str(held) in first.stdout.readline() and first.stdout.readline() == "inside\n"
    second = start(path, 0)
    assert second.communicate()[1] == "error: it is at work\n" and second.returncode == 2
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert held.exists()
    third = start(path, 0)
    assert third.communicate()[0].endswith("inside\n") and third.returncode == 0
    assert not held.exists()


def test_of_two_that_take_over_a_dead_ones_lock_one_gets_it(tmp_path):
    (tmp_path / "lock.held").write_text(
        json.dumps({"host": files._host(), "pid": os.getpid(), "started": "1"})
    )  # a number used again
    both = [start(tmp_path / "lock", 2), start(tmp_path / "lock", 2)]
    said = [process.communicate() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ('{"host": "another x y", "pid": 1, "started": "5"}', errno.ENOLCK),
        ("", errno.ENOSYS),
        ("[]", errno.ENOTSUP),
        ('{"host": 3}', errno.EOPNOTSUPP),
    ],
)
def test_a_lock_file_that_this_machine_cannot_judge_is_named(
    tmp_path, monkeypatch, content, number
):
    def no_locks(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / "lock.held").write_text(content)
    who = "process 1 on another" if "another" in content else "the process that created it"
    with (
        pytest.raises(
            BadInput, match=f"it is at work; if {who} has ended, remove {tmp_path}/lock.held"
        ),
        locked(tmp_path / "lock", "it is at work"),
    ):
        pass
    assert (tmp_path / "lock.held").read_text() == content
    (tmp_path / "lock.held").unlink()
    with (
        locked(tmp_path / "lock", "x"),
        pytest.raises(BadInput, match="^y$"),
        locked(tmp_path / "lock", "y"),
    ):
        pass
    with locked(tmp_path / "lock", "x"):
        pass


def test_another_error_of_a_lock_is_an_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock", "x"):
        pass
