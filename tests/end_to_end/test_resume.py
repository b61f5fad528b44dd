"""A run resumed with another config, from a damaged checkpoint, or without one: what it says, keeps
and refuses. In this process.
"""

import itertools
import json
import pathlib
import shutil
import zlib

import pytest
from ml_collections import ConfigDict

from nanollama_jax import checkpoint, curriculum
from nanollama_jax.checkpoint.origin import check_changes
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.loop import train
from nanollama_jax.train.metrics import read_rows
from nanollama_jax.train.optimizer import schedules
from tests.end_to_end.conftest import rows
from tests.end_to_end.test_tuning import THETA


def config_of(lab, recipe: str, *settings: str) -> ConfigDict:
    return lab.config(recipe, *(f"--config.{setting}" for setting in settings))


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory) -> pathlib.Path:
    """The workdir of a phase that was to have 12 steps."""
    workdir = (
        tmp_path_factory.mktemp("finished") / "checkpoints"
    )  # a name that a run's own folder also has
    assert train(config_of(lab, "phase1", "end_step=12", "validation.every=6"), workdir).finished
    return workdir


@pytest.fixture
def workdir(finished, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished, tmp_path / "checkpoints" / "step_5"))


def test_a_finished_phase_goes_on_in_the_same_order_and_says_what_changed(lab, workdir, tmp_path):
    windows = checkpoint.read_metadata(workdir, 12).shuffle_windows
    first = (workdir / "config.json").read_bytes()
    longer = config_of(lab, "phase1", "end_step=20", "optimizer.peak_lr=1e-3")
    assert windows["docs"] < pipeline.shuffle_windows(longer.data.sources, 32, 20 * 8)["docs"]
    assert train(longer, workdir).step == 20
    # No row is skipped or doubled: the batches are those of a run that never stopped.
    sources = {
        name: pipeline.open_source(lab.root, name, Tokenizer(longer.tokenizer.path))
        for name in longer.data.sources
    }
    batches = iter(
        pipeline.train_batches(
            sources,
            longer.data.sources,
            Tokenizer(longer.tokenizer.path),
            batch_size=8,
            seq_len=32,
            max_segments=64,
            seed=0,
            windows=windows,
        )
    )
    logged = rows(workdir)
    assert list(logged) == list(range(1, 21))
    assert [row["batch_crc32"] for row in logged.values()] == [
        zlib.crc32(batch["tokens"]) for batch in itertools.islice(batches, 20)
    ]
    batches.close()
    log = (workdir / "log.txt").read_text()
    assert "3,072 tokens seen up to step 12" in log
    assert "config changed at step 12: end_step 12 -> 20, optimizer.peak_lr 0.002 -> 0.001" in log
    assert "(learning rate 0.002 -> 0.001, RoPE theta 10,000 at this step)" in log
    assert (workdir / "config_until_step_12.json").read_bytes() == first
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["peak_lr"] == 1e-3
    about = checkpoint.read_metadata(workdir, 20)
    assert (about.shuffle_windows, about.tokens_seen) == (windows, 20 * 256)

    # The next phase has other batches: its tokens are added, not multiplied.
    here = (
        "start_step=20",
        "end_step=22",
        "batch_size=4",
        "seq_len=32",
        "tokens_per_step=128",
        f"init_from={workdir}",
        "schedule.total_steps=90",
    )
    train(config_of(lab, "phase2_8k", *here), tmp_path / "phase2")
    assert checkpoint.read_metadata(tmp_path / "phase2", 22).tokens_seen == 20 * 256 + 2 * 128
    assert not list((tmp_path / "phase2").glob("config_until*"))


def test_a_damaged_checkpoint_stops_the_run_and_the_one_before_resumes(lab, workdir):
    config, latest = config_of(lab, "phase1", "end_step=14"), workdir / "checkpoints/step_12"
    file = max((latest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "config.json").read_bytes()
    with pytest.raises(
        BadInput, match=f"{file.name} is not what was written.*: to go back to step 6, rename it to"
    ):
        train(config, workdir)
    assert before == (
        (workdir / "metrics.jsonl").read_bytes(),
        (workdir / "config.json").read_bytes(),
    )
    latest.rename(latest.with_name("damaged_step_12"))
    assert train(config, workdir).finished and list(rows(workdir)) == list(range(1, 15))
    assert [path.name for path in workdir.glob("config_until*")] == ["config_until_step_6.json"]


def test_a_run_without_its_checkpoints_stops_and_one_that_saved_none_starts_again(lab, workdir):
    before = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    with pytest.raises(
        BadInput,
        match="had a checkpoint of step 12 and has none now: put checkpoints/step_12 back, or choose another workdir",
    ):
        train(config_of(lab, "phase1", "end_step=1"), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    (workdir / "latest_checkpoint.json").unlink()
    assert train(config_of(lab, "phase1", "end_step=1"), workdir).finished
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [0, 1, 1]


def test_a_checkpoint_is_no_workdir(lab, workdir):
    before = sorted(workdir.rglob("*"))
    with pytest.raises(
        BadInput, match=f"is a checkpoint: name its run, {workdir}, or another folder"
    ):
        train(config_of(lab, "phase1"), workdir / "checkpoints/step_12")
    assert sorted(workdir.rglob("*")) == before


def test_a_curriculum_says_how_a_phase_is_extended(lab, tmp_path):
    gates = "gates.perplexity=((20,1.0,2.0),(40,1.0,2.0),(80,1.0,2.0))"
    with pytest.raises(
        BadInput,
        match="phase1 ends at step 50 and phase2_8k starts at 40: to move what comes later, add ",
    ) as caught:
        curriculum.run(config_of(lab, "curriculum", "stages.phase1.end_step=50", gates), tmp_path)
    said = str(caught.value).partition(" add ")[2].replace("'", "").split()
    assert "--config.gates.perplexity=((20,1.0,2.0),(50,1.0,2.0),(90,1.0,2.0))" in said
    moved = config_of(
        lab,
        "curriculum",
        "stages.phase1.end_step=50",
        *(flag.removeprefix("--config.") for flag in said),
    )
    stages = curriculum.stages_of(moved)
    curriculum.check_succession(stages, moved)
    assert [(stage.start_step, stage.end_step) for stage in stages.values()] == [
        (0, 50),
        (50, 70),
        (70, 80),
        (80, 90),
        (0, 12),
        (0, 8),
    ]
    assert (moved.schedule.decay_start, moved.schedule.total_steps) == (80, 90)


def test_stages_that_stand_on_what_is_extended_are_not_taken_for_finished(lab, workdir, tmp_path):
    stages = curriculum.stages_of(config_of(lab, "curriculum"))
    root = tmp_path / "curriculum"
    root.mkdir()
    shutil.copytree(workdir, root / "phase1")  # at step 12 of 40
    curriculum.check_nothing_outdated(stages, root)
    shutil.copytree(workdir, root / "sft")
    with pytest.raises(
        BadInput,
        match=rf"phase1 would continue from step 12 to 40, and later .* move {root}/sft elsewhere",
    ):
        curriculum.check_nothing_outdated(stages, root)
    shutil.rmtree(root / "phase1")
    with pytest.raises(BadInput, match="phase1 has no checkpoint, and later stages"):
        curriculum.check_nothing_outdated(stages, root)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_fine_tuning_is_extended_where_the_rate_is_said(lab, task):
    """A decayed rate does not come back because the stage is longer."""
    end = {"sft": 12, "dpo": 8}[task]

    def about(*settings):
        return json.loads(
            config_of(
                lab, task, *(flag.removeprefix("--config.") for flag in THETA), *settings
            ).to_json_best_effort()
        )

    longer = [f"end_step={end + 8}", f"schedule.total_steps={end + 8}"]
    with pytest.raises(
        BadInput,
        match=rf"with end_step {end} -> .* would jump at step {end} from 0 to .*decay_start={end} ",
    ):
        check_changes(about(), about(*longer), end, schedules)
    assert f"(learning rate 0 -> {about()['optimizer']['peak_lr']:.3g}" in check_changes(
        about(), about(*longer, f"schedule.decay_start={end}"), end, schedules
    )
