"""A run that diverges, or resumes from a damaged checkpoint, stops each time it is started and keeps
its good checkpoints. Also: what signals and kills leave on record. These tests run in one process,
for speed; tests/end_to_end/test_training.py sends signals to real ones.
"""

import math
import os
import shutil
import signal

import jax
import pytest

from nanollama_jax import curriculum
from nanollama_jax.checkpoint import Checkpoints
from nanollama_jax.corpus import finetuning
from nanollama_jax.errors import RunStopped
from nanollama_jax.train import metrics
from nanollama_jax.train.loop import train

KEEP = "--config.checkpoint.keep_last=2"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(lab):
    """Each run compiles the same programs."""
    settings = {
        "jax_compilation_cache_dir": str(lab.root / "jax_cache_in_process"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def at_18(lab, tmp_path_factory):
    """A phase1 that was stopped by a signal at step 18 of 40."""
    workdir = tmp_path_factory.mktemp("stopped") / "phase1"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 17)
        assert not train(lab.config("phase1", KEEP), workdir).finished
    return workdir


def signal_at(patch, at):
    """SIGTERM as the metrics of step `at` are written: one step late, but before its validation and
    checkpoint if they are due."""
    write = metrics.Reporter.step

    def step(self, step, *arguments, **named):
        write(self, step, *arguments, **named)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(metrics.Reporter, "step", step)


def poison(patch, value, of="params"):
    """The first weight that a checkpoint restores is damaged."""
    restore = Checkpoints.restore

    def restored(self, *arguments):
        state, data = restore(self, *arguments)

        def where(path, x):
            return (
                f"{of}" in jax.tree_util.keystr(path)
                and "head" in jax.tree_util.keystr(path)
                and x.ndim == 2
            )

        return jax.tree.map_with_path(
            lambda path, x: x.at[:, 0].set(value) if where(path, x) else x, state
        ), data

    patch.setattr(Checkpoints, "restore", restored)


def saved(workdir):
    return {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").glob("step_*")}


def stopped(call):
    with pytest.raises(RunStopped) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("value", "of"), [(math.nan, "params"), (1e38, "params"), (math.nan, "mu"), (math.inf, "nu")]
)
def test_a_damaged_checkpoint_is_not_resumed_from(lab, at_18, tmp_path, monkeypatch, value, of):
    shutil.copytree(at_18, tmp_path / "phase1")
    before = saved(tmp_path / "phase1")
    poison(monkeypatch, value, of)
    for _ in range(2):
        said = stopped(lambda: train(lab.config("phase1", KEEP), tmp_path / "phase1"))
        assert (
            "not finite" in said
            and "step_18" in said
            and "training resumes from step 12" in said
            and "peak_lr" not in said
        )
    assert saved(tmp_path / "phase1") == before


def test_a_run_that_diverges_saves_nothing_and_stops_each_time(lab, at_18, tmp_path):
    extra = "--config.optimizer.peak_lr=1.0"
    shutil.copytree(at_18, tmp_path / "phase1")
    before = saved(tmp_path / "phase1")
    said = [
        stopped(lambda: train(lab.config("phase1", KEEP, extra), tmp_path / "phase1"))
        for _ in range(2)
    ]
    assert (
        said[0] == said[1]
        and "The last good checkpoint is" in said[0]
        and "step_18: lower optimizer.peak_lr (now 1)" in said[0]
    )
    assert saved(tmp_path / "phase1") == before
    # a curriculum does not walk on
    config = lab.config("curriculum", KEEP, extra)
    assert "step_18" in stopped(lambda: curriculum.run(config, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"phase1"}


def test_updates_that_stay_not_finite_stop_the_run(lab, at_18, tmp_path, monkeypatch):
    """1e18 in a column of the head has a finite norm; the gradient has none."""
    shutil.copytree(at_18, tmp_path / "phase1")
    before = saved(tmp_path / "phase1")
    poison(monkeypatch, 1e18)
    said = stopped(lambda: train(lab.config("phase1", KEEP), tmp_path / "phase1"))
    assert "step_18" in said and "training resumes from step 12" in said
    assert saved(tmp_path / "phase1") == before


def test_a_signal_during_validation_takes_effect_at_once(lab, tmp_path, monkeypatch):
    """Also in the last one: the stage is finished once it is validated."""
    short = ("--config.end_step=3", "--config.validation.every=3")
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 3)
        assert not train(lab.config("phase1", *short), tmp_path).finished

    def validated():
        return [
            row["step"]
            for row in metrics.read_rows(tmp_path / "metrics.jsonl")
            if "validation_perplexity" in row
        ]

    assert validated() == [0] and [path.name for path in saved(tmp_path)] == ["step_3"]
    for _ in range(2):
        assert train(lab.config("phase1", *short), tmp_path).finished
        assert validated() == [0, 3]


def test_fine_tuning_killed_before_its_first_checkpoint_starts_again(lab, at_18, tmp_path, capfd):
    """Step 0's validation was once recorded twice, and the base model's step 18 logged as step 0."""
    theta = ("--config.rope.start_theta=10000.0", "--config.rope.end_theta=10000.0")
    config = lab.config(
        "sft",
        *theta,
        f"--config.init_from={at_18}",
        "--config.end_step=1",
        "--config.samples.every=0",
    )
    finetuning.prepare_stage(config)

    def kill(*_):
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", kill)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, tmp_path)
    before = metrics.read_rows(tmp_path / "metrics.jsonl")
    train(config, tmp_path)
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in before] == [0, 1, 1] and rows[
        0
    ] == before[0]
    assert f"weights from step 18 of {at_18}" in capfd.readouterr().out
