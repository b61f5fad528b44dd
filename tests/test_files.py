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


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "lock", "first"), pytest.raises(BadInput, match="second"), locked(tmp_path / "lock", "second"):
        pytest.fail("two are inside")
    with locked(tmp_path / "lock", "third"):
        pass
