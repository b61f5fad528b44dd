"""Bad input ends in one clear line and a non-zero exit, and loses nothing.

What is checked is checked in this process; a few real processes show that main.py and the tools end
in that line and status.
"""

import json
import shutil
import subprocess
import sys

import pytest

from nanollama_jax import checkpoint, curriculum
from nanollama_jax.corpus.prepare import train_tokenizer_for
from nanollama_jax.errors import BadInput
from nanollama_jax.train.loop import train
from tests.conftest import ROOT
from tests.end_to_end.conftest import SOURCES


def refused(lab, recipe, workdir, *flags):
    """What a run says that is refused in this process: one line."""
    config = lab.config(recipe, *flags)
    run = curriculum.run if "stages" in config else train
    with pytest.raises(BadInput) as caught:
        run(config, workdir)
    said = str(caught.value)
    assert said and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.optimizer.peak_lrr=1", "peak_lrr"),
        ("--num_processes=2", "--process_id"),
        ("--workdir=main.py", "main.py"),
        ("--config.data.dir=absent", "tools/prepare_data.py"),
    ],
)
def test_main_ends_in_one_line(lab, tmp_path, flag, says):
    """tests/test_config.py and tests/test_distributed.py have the other mistakes."""
    assert says in lab.run("phase1", tmp_path / "run", flag, expect=2)
    assert checkpoint.find(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.batch_size=9", "tokens_per_step"),
        ("--config.accumulation=3", "accumulation=3"),
        ("--config.mesh.data=5", "mesh.data=5"),
        ("--config.model.num_heads=3", "num_kv_heads"),
        ("--config.data.sources.docs=0.0", "data.sources.docs=0.0: must be"),
        ("--config.model.attention=cudnn", "model.document_mask=False"),
        ("--config.model.vocab_size=512", "320 pieces"),
        ("--config.end_step=500", "total_steps"),
        ("--config.tokenizer.path=absent.model", "absent.model"),
        ("--config.init_from=absent", "no checkpoint"),
        ("--config.start_step=10", "init_from"),
    ],
)
def test_a_config_that_cannot_be_trained(lab, tmp_path, flag, says):
    assert says in refused(lab, "phase1", tmp_path / "run", flag)
    assert checkpoint.find(tmp_path / "run") is None


def test_an_empty_workdir(lab):
    assert "the path is empty" in refused(lab, "phase1", "")


def test_recipes_that_do_not_load_and_help():
    """tests/test_config.py has more mistakes, in one process."""
    for command, *flags in (
        ("main.py", "--config", "configs/absent.py"),
        ("main.py", "--config=configs/phase1.py", "--conifg.seed=1"),
        ("tools/prepare_data.py",),
    ):
        done = subprocess.run(
            [sys.executable, command, *flags], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1
    done = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--workdir" in done.stdout
    assert "python main.py --config configs/curriculum.py:nano" in done.stdout


def test_four_devices_cannot_split_a_batch_of_two(lab, tmp_path):
    flags = ["--config.batch_size=2", "--config.tokens_per_step=64"]
    assert "cannot be split over 4 device(s)" in refused(lab, "phase1", tmp_path, *flags)


def test_a_truncated_shard_is_named(lab, tmp_path):
    for name in SOURCES:
        shutil.copytree(lab.root / name, tmp_path / name)
    shard = next((tmp_path / "docs").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    flag = f"--config.data.dir={tmp_path}"
    assert shard.name in refused(lab, "phase1", tmp_path / "run", flag)


def test_data_prepared_with_another_tokenizer(lab, tmp_path):
    other = tmp_path / "other.model"
    train_tokenizer_for(
        [f"file://{lab.root}/docs.jsonl", f"file://{lab.root}/code.jsonl"], other, 320, 10**6
    )
    flag = f"--config.tokenizer.path={other}"
    assert "another tokenizer" in refused(lab, "phase1", tmp_path / "run", flag)


def test_files_that_are_not_text_and_sources_without_any(lab, tmp_path):
    for name, content, says in (
        ("latin1", b'{"text": "na\xefve"}\n', "UTF-8"),
        ("nul", b'{"text": "a\\u0000b"}\n', "NUL"),
        ("empty", b"", "no documents"),
        ("broken", b'{"text": "a"\n', "JSON"),
    ):
        bad = tmp_path / f"{name}.jsonl"
        bad.write_bytes(b'{"text": "good"}\n' * 3 * bool(content) + content)
        flags = [f"--config.data.dir={tmp_path / name}", f"--config.corpora.docs.url=file://{bad}"]
        said = refused(lab, "curriculum", tmp_path / "run", *flags)
        assert says in said and (name == "empty" or f"{bad.name}:4" in said), said
    flags = ["--config.corpora.docs.url=file://absent/*.txt", f"--config.data.dir={tmp_path / 'd'}"]
    assert "absent" in refused(lab, "curriculum", tmp_path / "run", *flags)


@pytest.fixture(scope="module")
def phase1(lab, tmp_path_factory):
    """The workdir of a finished first stage."""
    workdir = tmp_path_factory.mktemp("phase1")
    assert train(lab.config("phase1"), workdir).finished
    return workdir


def test_a_workdir_of_another_model_is_refused_and_kept(lab, phase1):
    before = checkpoint.find(phase1)
    said = refused(lab, "phase1", phase1, "--config.model.d_model=64")
    assert "d_model=32 (config: 64)" in said and checkpoint.find(phase1) == before


@pytest.mark.parametrize("flag", ["seed=7", "data.max_segments=3", "data.sources.docs=2.0"])
def test_other_batches_than_before_are_refused(lab, phase1, flag):
    before = (phase1 / "config.json").read_bytes()
    said = refused(lab, "phase1", phase1, f"--config.{flag}")
    assert flag.split("=")[0].removesuffix(".docs") in said
    assert (phase1 / "config.json").read_bytes() == before


def test_a_later_stage_that_cannot_be_is_refused_at_once(lab, tmp_path):
    said = refused(lab, "curriculum", tmp_path, "--config.stages.phase3.batch_size=7")
    assert "tokens_per_step" in said and not list(tmp_path.iterdir())


def test_a_stage_that_does_not_start_where_the_other_stands(lab, phase1, tmp_path):
    said = refused(lab, "phase2_16k", tmp_path, f"--config.init_from={phase1}")
    assert "at step 40 and phase2_16k starts at 60" in said


def test_a_second_run_in_the_same_workdir(lab, tmp_path):
    process = lab.start("phase1", tmp_path)
    try:
        while not (tmp_path / "metrics.jsonl").exists():
            assert process.poll() is None
        assert "another run is at work" in lab.run("phase1", tmp_path, expect=2)
    finally:
        process.communicate(timeout=120)
    assert process.returncode == 0


def test_no_room_for_a_checkpoint(lab, tmp_path):
    """A real file system of 1.5 MB. The first checkpoint fits, the next ones do not; what was saved
    stays, and the run resumes once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        said = lab.run("phase1", small / "run", "--config.checkpoint.keep_last=50", expect=2)
        step = checkpoint.find(small / "run")[1]
        assert "free some space" in said and f"from step {step}" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        said = lab.run("phase1", small / "run", "--config.checkpoint.keep_last=50")
        assert f"at step {step}" in said and "finished at step 40" in said
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_metadata_is_json_a_person_can_read(phase1):
    path = phase1 / "checkpoints" / "step_40" / "metadata" / "metadata"
    assert json.loads(path.read_text())["phase"] == "phase1"
