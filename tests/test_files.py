import socket
import subprocess
import sys

import pytest

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


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path, host = tmp_path / "curves[1].png", socket.gethostname()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    begun = [tmp_path / f".curves[1].png.{at}.tmp" for at in (f"{host}.{gone.pid}", f"{host}.1", f"elsewhere.{gone.pid}", f"{host}.x")]
    begun.append(tmp_path / f".other.png.{host}.{gone.pid}.tmp")
    for file in begun:
        file.touch()
    with whole_file(path) as file:
        file.write(b"new")
    assert set(tmp_path.iterdir()) == {path, *begun[1:]}


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "lock", "first"), pytest.raises(BadInput, match="second"), locked(tmp_path / "lock", "second"):
        pytest.fail("two are inside")
    with locked(tmp_path / "lock", "third"):
        pass
