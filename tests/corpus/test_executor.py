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
from datatrove.pipeline.base import PipelineStep

from nanollama_jax import tokenizer
from nanollama_jax.corpus import executor, prepare
from nanollama_jax.corpus.executor import Executor, run_ranks
from nanollama_jax.errors import BadInput

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = Executor()


class Upper(PipelineStep):
    """Copies FOLDER/in/RANK to FOLDER/out/RANK in capitals; some inputs are orders."""

    name, type = "upper", "Writer"

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        text = (self.folder / "in" / str(rank)).read_text()
        if text == "bad":
            raise BadInput(f"in/{rank} is bad")
        if text == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "sleep":
            (self.folder / "asleep").touch()
            time.sleep(60)
        if text == "process":
            text = f"{os.getppid()} {'jax' in sys.modules} {'nanollama_jax.corpus.prepare' in sys.modules}"
        (self.folder / "out" / str(rank)).write_text(text.upper())


def run(folder: pathlib.Path, how: Executor = LOCAL) -> bool:
    return run_ranks([Upper(folder)], how, name="letters", tasks=3, logs=folder / "logs")


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
    """All ranks have output, log and stats; what there was `before` is untouched."""
    assert outputs(folder) == {"0": "A", "1": "B", "2": "C"}
    for rank in range(3):
        assert "Processing done for" in (folder / f"logs/logs/task_0000{rank}.log").read_text()
        assert (folder / f"logs/stats/0000{rank}.json").stat().st_size
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
        (dict(kind="dask"), "executor 'dask' is unknown: there are local, slurm, ray"),
        (dict(workers=-1), "workers=-1 must be at least 1"),
        (dict(kind="slurm"), "executor slurm needs a partition"),
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
    (folder / "logs/completions/00001").unlink()
    assert run(folder)
    assert set(outputs(folder).values()) == {f"{forkserver._forkserver._forkserver_pid} FALSE TRUE"}
    assert os.environ.get("PYTHONPATH") == path
    lines, errors = capfd.readouterr()
    assert (
        re.fullmatch(r"(letters: 3/3 ranks, 0 documents, 0\.0 MB/s, \d+ s\n)+", lines)
        and errors == ""
    )


def test_a_finished_pipeline_starts_nothing(folder, monkeypatch):
    assert run(folder)
    monkeypatch.setattr(executor.PoolExecutor, "run", None)
    for how in (LOCAL, Executor("ray"), Executor("slurm", partition="cpu")):
        assert run(folder, how)


def test_a_worker_that_is_killed_is_bad_input_and_the_next_call_starts_others(folder):
    write(folder, "a", "kill", "c")
    with pytest.raises(
        BadInput,
        match=r"^a worker preparing letters was killed \(out of memory\?\): run the same command to go on from there$",
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
    sign = folder / ("logs/executor.json" if moment == "importing" else "asleep")
    while not sign.exists():
        assert process.poll() is None
        time.sleep(0.005)
    if moment == "importing":
        time.sleep(0.3)  # executor.json is written just before the server starts
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes of the group
    assert process.communicate(timeout=30) == (
        "",
        "error: stopped; run the same command to go on\n",
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
    reason = f"rank 1 failed, and so did 1 more: in/1 is bad ({folder}/logs/logs/task_00001.log)"
    assert (
        errors
        == f"error: letters: {reason}: mend that, and the same command redoes what failed, alone\n"
    )
    assert process.returncode == 2 and re.fullmatch(r"(letters: \d/3 ranks, \d+ s\n)*", out)
    assert outputs(folder) == {"0": "A"}
    before = times(folder)
    assert (
        "The worker died unexpectedly"
        in (folder / "logs/logs/task_00002.log").read_text().splitlines()[-1]
    )

    write(folder, "a", "b", "c")
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    capfd.readouterr()
    assert run(folder, Executor("ray"))
    assert_complete(folder, before)
    out, errors = capfd.readouterr()
    assert re.fullmatch(r"(letters: \d/3 ranks, \d+ s\n)+", out) and "3/3" in out and errors == ""


def test_ray_prepares_the_same_bytes_as_this_machine(ray_cluster, tmp_path, monkeypatch):
    texts = [f"document {i}, which says {'very ' * (i % 50)}little" for i in range(500)]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    tokenizer.train(texts, tmp_path / "t.model", 290, 10**6)
    prepare_in = lambda name, how: prepare.prepare_source(  # noqa: E731
        "corpus",
        f"file://{tmp_path}/texts.jsonl",
        "",
        tmp_path / name,
        tmp_path / "t.model",
        validation_fraction=0.1,
        tasks=4,
        executor=how,
    )
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    assert prepare_in("ray", Executor("ray")) == prepare_in("local", LOCAL)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("ray", "local")
    ]
    assert files[0] == files[1] and len(files[0]) == 9  # four ranks' two splits, and the manifest
    for path in ("logs/logs/task_00003.log", "logs/stats/00003.json", "logs/completions/00003"):
        assert (tmp_path / "ray" / path).exists()
    assert '"tokens"' in (tmp_path / "ray/logs/stats/00003.json").read_text()


def test_without_ray_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        BadInput, match=rf"^executor ray needs Ray: pip install ray=={executor.RAY_VERSION}$"
    ):
        run(folder, Executor("ray"))
    assert f"ray=={executor.RAY_VERSION}\n" in (ROOT / "requirements-dev.txt").read_text()


# Slurm, of which these stand-ins run a job's script at once, in an empty environment; squeue lists what is written in the file `queue`

SLURM_COMMANDS = {
    "sbatch": r"""
        script="${@: -1}"
        cp "$script" ../submitted
        last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
        for i in $(seq 0 "$last"); do
            env -i PATH="$PWD:/usr/bin:/bin" SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=node1 RUN_OFFSET=0 bash "$script" > ../output_$i 2>&1 &
        done
        wait
        echo Submitted batch job 4711""",
    "srun": '[ "$1 $2 $3" = "-l -n 1" ] && shift 3 && exec "$@"',
    "scontrol": '[ "$*" = "show hostnames node1" ] && echo node1',
    "squeue": '[ "$*" = "--noheader --jobs=4711" ] && cat ../queue 2>/dev/null || { echo Invalid job id specified >&2; exit 1; }',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> pathlib.Path:
    (tmp_path / "bin").mkdir()
    for name, text in SLURM_COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\ncd "{tmp_path}/bin"\n{text}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path


SLURM = Executor("slurm", workers=2, partition="cpu", time="1:00:00", memory_gb=3)
SUBMITTED = "when it has ended (squeue --jobs=4711), run the same command again: it redoes failed ranks alone, and completes the corpus\n"


def test_a_rank_that_fails_on_slurm_is_named_and_redone_alone(folder, slurm, capfd):
    write(folder, "a", "bad", "c")
    assert run(folder, SLURM) is False
    assert capfd.readouterr() == (
        f"letters: submitted Slurm job 4711 for 3 of 3 ranks: {SUBMITTED}",
        "",
    )
    directives = re.findall(r"^#SBATCH --(.*)$", (slurm / "submitted").read_text(), re.MULTILINE)
    output = f"{folder}/logs/slurm_logs/%A_%a.out"
    assert set(directives) == {
        "cpus-per-task=1",
        "mem-per-cpu=3G",
        "nodes=1",
        "partition=cpu",
        "job-name=prepare_letters",
        "time=1:00:00",
        f"output={output}",
        f"error={output}",
        "array=0-2%2",
        "requeue",
    }
    before = times(folder)
    assert outputs(folder) == {"0": "A", "2": "C"}

    for how in (SLURM, LOCAL):
        (slurm / "queue").write_text("4711_[0-2] cpu prepare_letters PD\n")
        assert run(folder, how) is False
        assert (
            capfd.readouterr().out
            == "letters: Slurm job 4711 is not over yet (squeue --jobs=4711): run the same command again when it is\n"
        )
        assert times(folder) == before

    (slurm / "queue").unlink()
    write(folder, "a", "b", "c")
    assert run(folder, SLURM) is False
    log = folder / "logs/logs/task_00001.log"
    failed = f"letters: rank 1 failed: in/1 is bad ({log})\n"
    assert (
        capfd.readouterr().out
        == f"{failed}letters: submitted Slurm job 4711 for 1 of 3 ranks: {SUBMITTED}"
    )
    assert "#SBATCH --array=0-0%2\n" in (slurm / "submitted").read_text()
    assert run(folder, SLURM) is True
    assert capfd.readouterr() == ("", "")
    assert_complete(folder, before)


def test_what_slurm_does_not_do(folder, slurm, monkeypatch, capfd):
    (slurm / "bin/sbatch").write_text(
        "#!/bin/bash\necho sbatch: error: invalid partition specified: cpu >&2\nexit 1\n"
    )
    with pytest.raises(
        BadInput,
        match=r"sbatch refused the job of letters \(exit status 1\): what it said stands above",
    ):
        run(folder, SLURM)
    assert capfd.readouterr().err == "sbatch: error: invalid partition specified: cpu\n"
    (folder / "logs/slurm_job").write_text("4711")
    (slurm / "bin/squeue").write_text(
        "#!/bin/bash\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n"
    )
    with pytest.raises(
        BadInput,
        match=r"squeue does not tell whether job 4711 is over: .*Unable to contact slurm controller: try again later",
    ):
        run(folder, SLURM)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(BadInput, match="no squeue here tells whether it is over"):
        run(folder)
    (folder / "logs/slurm_job").unlink()
    with pytest.raises(BadInput, match="there is no sbatch here: run this on a login node"):
        run(folder, SLURM)
