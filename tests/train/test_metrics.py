"""metrics.jsonl after a crash of the machine: damaged lines are set aside, and the run resumes."""

import json

import pytest

from nanollama_jax.train import metrics

DAMAGED = [
    b"\0" * 40,
    b'{"step": 2, "lo',
    b'{"loss": 1.0}',
    b'{"step": "2"}',
    b"[2]",
    b'{"step": 2, "a": "\xff\xfe"}',
    b"",
]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_set_aside(tmp_path, damaged, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": float("nan")}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([rows[0], damaged, *rows[1:], b'{"step": 4, "cut sh']))
    said = []
    monkeypatch.setattr(metrics.log, "warning", lambda form, *values: said.append(form % values))
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2, 3]
    with metrics.open_trimmed(path, 2) as file:
        file.write('{"step": 3, "validation": {}}\n')
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == damaged + b"\n"
    assert said == [
        f"{path}: damaged line(s) 2 left out",
        f"{path}: damaged line(s) 2 moved to metrics.jsonl.bad",
    ]
    assert [metrics.validated_at(path, step) for step in (2, 3)] == [False, True]


def test_without_damage_nothing_is_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.open_trimmed(path, 0).close()
    path.write_text('{"step": 1}\n')
    metrics.open_trimmed(path, 5).close()
    assert path.read_text() == '{"step": 1}\n' and [each.name for each in tmp_path.iterdir()] == [
        "metrics.jsonl"
    ]
