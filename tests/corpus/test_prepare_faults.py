"""Preparation that is killed, crowded out or tampered with: run as a process of its own."""

# ruff: noqa: F811  fixtures of another file

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from nanollama_jax.corpus.executor import Executor
from nanollama_jax.data import shards
from nanollama_jax.errors import BadInput
from tests.corpus.test_prepare import contents, corpus, model, run, texts  # noqa: F401  fixtures among them

SCRIPT = """
import sys
from nanollama_jax.corpus import prepare
from nanollama_jax.corpus.executor import Executor
from nanollama_jax.errors import one_line_errors
if __name__ == "__main__":
    corpus, model, out_dir = sys.argv[1:]
    with one_line_errors():
        settings = dict(validation_fraction=0.1, tasks=6, executor=Executor(workers=2), shard_tokens=20_000)
        prepare.prepare_source("corpus", "file://" + corpus, "CC0", out_dir, model, **settings)
"""


@pytest.fixture(scope="module")
def big_corpus(texts, tmp_path_factory) -> pathlib.Path:
    """Some seconds' work, so that there is something to kill."""
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(8) for text in texts)
    )
    return path


def start(script, *arguments, **options) -> subprocess.Popen:
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_kill_9_then_the_same_command_gives_the_same_bytes(big_corpus, model, tmp_path):
    assert start(tmp_path / "run.py", big_corpus, model, tmp_path / "undisturbed").wait() == 0
    killed = tmp_path / "killed"
    for sign in (
        "*.tmp",
        "logs/ranks/*.json",
    ):  # the first file begun; the first rank done, of six on two workers
        process = start(tmp_path / "run.py", big_corpus, model, killed)
        while not list(killed.glob(sign)):
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "manifest.json").exists()
    finished = {
        path: path.stat().st_mtime_ns
        for rank in _finished_ranks(killed)
        for path in killed.glob(f"*-{rank}-*")
    }
    assert finished
    assert start(tmp_path / "run.py", big_corpus, model, killed).wait() == 0
    assert contents(killed) == contents(tmp_path / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, (
        "a finished rank was done again"
    )


def _finished_ranks(directory) -> list[str]:
    return [path.stem for path in (directory / "logs/ranks").glob("*.json")]


def test_workers_die_with_a_killed_parent(big_corpus, model, tmp_path):
    process = start(tmp_path / "run.py", big_corpus, model, tmp_path / "out")
    while not list((tmp_path / "out").glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.005)
    workers = _workers(process.pid)
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, (
            "a worker lives on and would write into its successor's shards"
        )
        time.sleep(0.01)


def test_a_killed_worker_is_one_line_and_not_a_hang(big_corpus, model, tmp_path):
    process = start(tmp_path / "run.py", big_corpus, model, tmp_path / "out")
    while not list((tmp_path / "out").glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(_workers(process.pid)[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "was killed (out of memory?): rerun the command" in stderr and stderr.count("\n") == 1, (
        stderr
    )


def _alive(pid: int) -> bool:
    try:
        return (
            pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )  # a container's init may not reap
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(pid: int) -> list[int]:
    return [
        int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def _workers(pid: int) -> list[int]:
    """In order of birth: the children of the fork server, which is a child of `pid`."""
    return [worker for child in _children(pid) for worker in _children(child)]


def test_a_full_disk_is_one_line(corpus, model, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    process = start(tmp_path / "run.py", corpus, model, tmp_path / "out", preexec_fn=limit)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        "cannot be written" in stderr and "is the disk full?" in stderr and stderr.count("\n") == 1
    ), stderr


def test_an_error_in_a_worker_names_the_line_and_leaves_earlier_work(corpus, model, tmp_path):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    lines = corpus.read_bytes().splitlines(keepends=True)
    lines[301] = b'{"text": "\xff"}\n'  # line 302, the second of two ranks'
    bad.write_bytes(b"".join(lines))
    with pytest.raises(BadInput, match=r"bad\.jsonl:302: invalid UTF-8"):
        run(bad, model, out, tasks=2, executor=Executor(workers=1))
    assert _finished_ranks(out) == ["00000"]
    assert "invalid UTF-8" in (out / "logs/ranks/00001.log").read_text()
    first_rank = {path: path.stat().st_mtime_ns for path in out.glob("*-00000-*")}
    assert first_rank
    lines[301] = b'{"text": "mended"}\n'
    bad.write_bytes(b"".join(lines))
    with pytest.raises(
        BadInput,
        match=r"were changed since .*; if a line was corrected in its place, remove .*inputs\.json and rerun the command",
    ):
        run(bad, model, out, tasks=2, executor=Executor(workers=1))
    (out / "logs/inputs.json").unlink()
    run(bad, model, out, tasks=2, executor=Executor(workers=1))
    assert {path: path.stat().st_mtime_ns for path in first_rank} == first_rank


def test_nothing_but_the_error_is_printed(model, tmp_path):
    (tmp_path / "nul.jsonl").write_text('{"text": "a\\u0000b"}\n')
    _, stderr = start(
        tmp_path / "run.py", tmp_path / "nul.jsonl", model, tmp_path / "out"
    ).communicate(timeout=60)
    assert (
        stderr == f"error: {tmp_path}/nul.jsonl:1: the text holds a NUL byte: is it really text?\n"
    )


def test_two_at_once_into_one_folder(big_corpus, model, tmp_path):
    first = start(tmp_path / "run.py", big_corpus, model, tmp_path / "out")
    while not list((tmp_path / "out").glob("*.tmp")):
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # or it may end while the second still imports
    second = start(tmp_path / "run2.py", big_corpus, model, tmp_path / "out")
    _, stderr = second.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert (
        second.returncode == 2
        and "is being prepared by another process: wait for it to end" in stderr
        and stderr.count("\n") == 1
    ), stderr
    assert first.wait(timeout=60) == 0
    assert shards.load_manifest(tmp_path / "out")["splits"]["train"]["documents"] > 2000


def test_a_shard_edited_after_it_was_written_is_named(corpus, model, tmp_path):
    manifest = run(corpus, model, tmp_path / "out")
    shard = tmp_path / "out" / manifest["splits"]["train"]["shards"][1]["file"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        BadInput,
        match=f"shard {shard} is damaged or was replaced: its checksum differs: restore it",
    ):
        run(corpus, model, tmp_path / "out")
