import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from nanollama_jax import files
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked, whole_file, write_json


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


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "lock", "first"), pytest.raises(BadInput, match="second"), locked(tmp_path / "lock", "second"):
        pytest.fail("two are inside")
    with locked(tmp_path / "lock", "third"):
        pass


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
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    (tmp_path / "lock.held").write_text(json.dumps({"host": files._host(), "pid": os.getpid(), "started": "1"}))  # a number used again
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
def test_a_lock_file_that_this_machine_cannot_judge_is_named(tmp_path, monkeypatch, content, number):
    def no_locks(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / "lock.held").write_text(content)
    who = "process 1 on another" if "another" in content else "the process that began it"
    with pytest.raises(BadInput, match=f"it is at work; if {who} is over, remove {tmp_path}/lock.held"), locked(tmp_path / "lock", "it is at work"):
        pass
    assert (tmp_path / "lock.held").read_text() == content
    (tmp_path / "lock.held").unlink()
    with locked(tmp_path / "lock", "x"), pytest.raises(BadInput, match="^y$"), locked(tmp_path / "lock", "y"):
        pass
    with locked(tmp_path / "lock", "x"):
        pass


def test_another_error_of_a_lock_is_an_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock", "x"):
        pass
