import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest

from nanollama_jax import tokenizer
from nanollama_jax.corpus import executor, prepare
from nanollama_jax.corpus.executor import Executor, run_ranks
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = Executor()


def upper(folder: pathlib.Path, rank: int, ranks: int) -> str:
    """Copies FOLDER/in/RANK to FOLDER/out/RANK in capitals; some inputs are orders."""
    text = (folder / "in" / str(rank)).read_text()
    if text == "bad":
        raise BadInput(f"in/{rank} is bad")
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "sleep":
        (folder / "asleep").touch()
        time.sleep(60)
    if text == "process":
        loaded = [name in sys.modules for name in ("jax", "nanollama_jax.corpus.prepare")]
        text = f"{os.getppid()} {loaded[0]} {loaded[1]}"
    (folder / "out" / str(rank)).write_text(text.upper())
    return text.upper()


def run(folder: pathlib.Path, how: Executor = LOCAL) -> list[str] | None:
    work = functools.partial(upper, folder)
    return run_ranks(work, how, name="letters", tasks=3, logs=folder / "logs")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name in ("in", "out", "logs"):
        (tmp_path / name).mkdir()
    write(tmp_path, "a", "b", "c")
    return tmp_path


def write(folder, *texts):
    for rank, text in enumerate(texts):
        (folder / "in" / str(rank)).write_text(text)


def outputs(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "out").iterdir())}


def times(folder) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}


def assert_complete(folder, before: dict[pathlib.Path, int]):
    """All ranks have output and result, none has failed; what there was `before` is untouched."""
    assert outputs(folder) == {"0": "A", "1": "B", "2": "C"}
    for rank, letter in enumerate("ABC"):
        assert json.loads((folder / f"logs/ranks/0000{rank}.json").read_text()) == letter
        assert not (folder / f"logs/ranks/0000{rank}.log").exists()
    assert before.items() <= times(folder).items(), "a finished rank was done again"


SCRIPT = """
import pathlib, sys
sys.path.insert(0, {root!r})
from nanollama_jax.errors import one_line_errors
from tests.corpus.test_executor import Executor, run
if __name__ == "__main__":
    with one_line_errors():
        print(run(pathlib.Path({folder!r}), Executor({kind!r})))
"""


def start(folder, kind: str) -> subprocess.Popen:
    """`run` in a process of its own, group and working directory of its own."""
    (folder / "run.py").write_text(SCRIPT.format(root=str(ROOT), folder=str(folder), kind=kind))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")
    }
    return subprocess.Popen(
        [sys.executable, "run.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(kind="dask"), "executor 'dask' is unknown: choose one of local, ray"),
        (dict(workers=-1), "workers=-1 must be at least 1"),
        (dict(num_ranks=-1), "num_ranks=-1 must be at least 1"),
        (dict(rank=0), "rank=0 must be at least 0 and below num_ranks"),
        (dict(rank=3, num_ranks=3), "rank=3 must be at least 0 and below num_ranks"),
        (dict(rank=-1, num_ranks=3), "rank=-1 must be at least 0 and below num_ranks"),
    ],
)
def test_an_executor_that_cannot_be(wrong, message):
    with pytest.raises(BadInput, match=message):
        Executor(**wrong)


# One machine


def test_workers_are_forks_of_one_server_that_imported_what_they_need(folder, monkeypatch, capfd):
    forkserver._forkserver._stop()  # what other tests started
    monkeypatch.chdir("/")  # the repository is not where Python looks by itself
    path = os.environ.get("PYTHONPATH")
    write(folder, "process", "process", "process")
    assert run(folder, Executor(workers=2))
    (folder / "logs/ranks/00001.json").unlink()
    assert run(folder)
    assert set(outputs(folder).values()) == {f"{forkserver._forkserver._forkserver_pid} FALSE TRUE"}
    assert os.environ.get("PYTHONPATH") == path
    lines, errors = capfd.readouterr()
    assert (
        re.fullmatch(r"(letters: 3/3 ranks, 0 documents, 0\.0 MB/s, \d+ s\n)+", lines)
        and errors == ""
    )


def test_a_finished_job_starts_nothing(folder, monkeypatch):
    assert run(folder)
    for name in ("_run_on_cores", "_run_on_ray", "_run_rank"):
        monkeypatch.setattr(executor, name, None)
    for how in (LOCAL, Executor("ray")):
        assert run(folder, how) == ["A", "B", "C"]


def test_a_worker_that_is_killed_is_bad_input_and_the_next_call_starts_others(folder):
    write(folder, "a", "kill", "c")
    with pytest.raises(
        BadInput,
        match=r"^a worker preparing letters was killed \(out of memory\?\): rerun the command to resume$",
    ):
        run(folder, Executor(workers=1))
    before = times(folder)
    write(folder, "a", "b", "c")
    assert run(folder)
    assert before.items() <= times(folder).items()


@pytest.mark.parametrize("moment", ["importing", "working"])
def test_ctrl_c_is_one_line(folder, moment):
    write(folder, "sleep", "sleep", "sleep")
    process = start(folder, "local")
    sign = folder / ("logs/ranks" if moment == "importing" else "asleep")
    while not sign.exists():
        assert process.poll() is None
        time.sleep(0.005)
    if moment == "importing":
        time.sleep(0.3)  # the folder is made just before the server starts
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes of the group
    assert process.communicate(timeout=30) == (
        "",
        "error: stopped; rerun the command to resume\n",
    )
    assert process.returncode == 2


# Ray


@pytest.fixture(scope="module")
def ray_cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield cluster.address
    cluster.shutdown()


def test_ranks_that_fail_on_ray_are_named_and_redone_alone(folder, ray_cluster, monkeypatch, capfd):
    write(folder, "a", "bad", "kill")
    process = start(folder, "ray")  # on a cluster that it starts
    out, errors = process.communicate(timeout=60)
    reason = f"rank 1 failed, and 1 more: in/1 is bad ({folder}/logs/ranks/00001.log)"
    remedy = "fix this and rerun; only the ranks that failed run again"
    assert errors == f"error: letters: {reason}: {remedy}\n"
    assert process.returncode == 2 and re.fullmatch(r"(letters: \d/3 ranks, \d+ s\n)*", out)
    assert outputs(folder) == {"0": "A"}
    before = times(folder)
    assert (
        "The worker died unexpectedly"
        in (folder / "logs/ranks/00002.log").read_text().splitlines()[-1]
    )

    write(folder, "a", "b", "c")
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    capfd.readouterr()
    assert run(folder, Executor("ray"))
    assert_complete(folder, before)
    out, errors = capfd.readouterr()
    assert re.fullmatch(r"(letters: \d/3 ranks, \d+ s\n)+", out) and "3/3" in out and errors == ""


def _corpus(folder: pathlib.Path):
    """Prepares a small corpus into FOLDER/NAME with an executor."""
    texts = [f"document {i}, which says {'very ' * (i % 50)}little" for i in range(500)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    tokenizer.train(texts, folder / "t.model", 290, 10**6)

    def prepare_in(name: str, how: Executor, validation_fraction: float = 0.1):
        return prepare.prepare_source(
            "corpus",
            f"file://{folder}/texts.jsonl",
            "",
            folder / name,
            folder / "t.model",
            validation_fraction=validation_fraction,
            tasks=4,
            executor=how,
        )

    return prepare_in


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert len(files) == 9  # four ranks' two splits, and the manifest
    return files


def times_of(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}


def test_ray_prepares_the_same_bytes_as_this_machine(ray_cluster, tmp_path, monkeypatch):
    prepare_in = _corpus(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    assert prepare_in("ray", Executor("ray")) == prepare_in("local", LOCAL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert json.loads((tmp_path / "ray/logs/ranks/00003.json").read_text())["train"]


def test_without_ray_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        BadInput, match=rf"^executor ray needs Ray: pip install ray=={executor.RAY_VERSION}$"
    ):
        run(folder, Executor("ray"))
    assert f"ray=={executor.RAY_VERSION}\n" in (ROOT / "requirements-dev.txt").read_text()


# An array of processes


def test_an_array_of_processes_shares_the_ranks(folder):
    write(folder, "a", "bad", "c")
    assert run(folder, Executor(num_ranks=2)) is None
    assert outputs(folder) == {}
    assert run(folder, Executor(num_ranks=2, rank=0)) is None
    assert outputs(folder) == {"0": "A", "2": "C"}
    with pytest.raises(BadInput, match="^in/1 is bad$"):
        run(folder, Executor(num_ranks=2, rank=1))
    assert "in/1 is bad" in (folder / "logs/ranks/00001.log").read_text()
    before = times(folder)

    write(folder, "a", "b", "c")
    for rank in range(2):  # the array again: it redoes what failed, alone
        assert run(folder, Executor(num_ranks=2, rank=rank)) is None
    assert_complete(folder, before)
    assert run(folder) == ["A", "B", "C"]
    assert_complete(folder, before)


def test_a_rank_runs_in_one_process_at_a_time(folder):
    (folder / "logs/ranks").mkdir()
    with (
        locked(folder / "logs/ranks/00001.lock", ""),
        pytest.raises(BadInput, match="rank 1 of .* is running in another process: wait for it"),
    ):
        run(folder, Executor(num_ranks=3, rank=1))
    assert outputs(folder) == {}


def test_an_array_prepares_the_same_bytes_as_this_machine(tmp_path):
    prepare_in = _corpus(tmp_path)
    with pytest.raises(BadInput, match="array is not set up: run this once without rank"):
        prepare_in("array", Executor(num_ranks=3, rank=1))
    for rank in (None, 2, 0, 1):
        assert prepare_in("array", Executor(num_ranks=3, rank=rank)) is None
    with pytest.raises(BadInput, match=r"validation_fraction=0\.1, not 0\.2"):
        prepare_in("array", Executor(num_ranks=3, rank=1), validation_fraction=0.2)
    before = times_of(tmp_path / "array")
    assert prepare_in("array", LOCAL) == prepare_in("local", LOCAL)
    assert before.items() <= times_of(tmp_path / "array").items()
    assert contents(tmp_path / "array") == contents(tmp_path / "local")
