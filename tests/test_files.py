import os

import pytest

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


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "lock", "first"), pytest.raises(BadInput, match="second"), locked(tmp_path / "lock", "second"):
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
        ("file/x", "file is no folder"),
        ("file/x/y", "file is no folder"),
        ("dangling/x", "dangling is no folder"),
        ("/dev/null", "is a device or a pipe"),
        ("/dev/null/x", "/dev/null is no folder"),
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "step_5"], "nothing is made by looking"
