"""Which checkpoint a run starts from, which it refuses, and how a changed config moves the
learning rate and RoPE theta.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from nanollama_jax import checkpoint
from nanollama_jax.checkpoint import Metadata
from nanollama_jax.checkpoint.origin import (
    changes,
    check_changes,
    extend_vocabulary,
    find_origin,
    kept_windows,
    reload_initial_params,
)
from nanollama_jax.errors import BadInput
from nanollama_jax.train.optimizer import schedules


def config(end_step=100, peak_lr=1e-3, theta=(1e4, 1e5), kind="ramp", **schedule):
    """A stage from step 0; the learning rate falls from step 200 to 300."""
    return {
        "start_step": 0,
        "end_step": end_step,
        "optimizer": {"peak_lr": peak_lr},
        "schedule": {"warmup_steps": 10, "decay_start": 200, "total_steps": 300} | schedule,
        "rope": {"schedule": kind, "start_theta": theta[0], "end_theta": theta[1]},
    }


FLAT = (1e4, 1e4)


def test_changes_are_named():
    assert changes({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3}) == {
        "a.c": ([1], [2]),
        "d": (2, None),
        "e": (None, 3),
    }
    assert check_changes(config(), config(), 50, schedules) == ""


@pytest.mark.parametrize(
    ("before", "now", "step", "says"),
    [
        (
            config(theta=FLAT),
            config(120, theta=FLAT),
            100,
            "end_step 100 -> 120 (learning rate 0.001, RoPE theta 10,000 at this step)",
        ),
        (
            config(theta=FLAT),
            config(80, theta=FLAT),
            50,
            "end_step 100 -> 80 (learning rate 0.001, RoPE",
        ),
        (
            config(theta=FLAT),
            config(theta=FLAT, peak_lr=5e-4),
            50,
            "(learning rate 0.001 -> 0.0005, RoPE",
        ),
        (
            config(),
            config(120, kind="jump"),
            50,
            "RoPE theta 31,623 -> 100,000 at this step",
        ),  # asked for
        (config(), config(120, kind="jump"), 100, "RoPE theta 100,000 at this step"),
        (config(kind="jump"), config(120, kind="jump"), 50, "end_step 100 -> 120"),
        (
            config(300, theta=FLAT),
            config(310, theta=FLAT, total_steps=310),
            150,
            "schedule.total_steps 300 -> 310 (learning rate 0.001, RoPE",
        ),
        (
            config(300, theta=FLAT),
            config(301, theta=FLAT, total_steps=301),
            210,
            "0.0009 -> 0.000901",
        ),  # 0.1 %: no jump
        (
            config(300, theta=FLAT),
            config(320, theta=FLAT, decay_start=300, total_steps=320),
            300,
            "(learning rate 0 -> 0.001, RoPE",
        ),
        (config(), config(60), 80, "end_step 100 -> 60"),  # nothing is left to train
    ],
)
def test_what_is_asked_for_or_does_not_jump_is_said(before, now, step, says):
    line = check_changes(before, now, step, schedules)
    assert says in line and line.startswith(f"config changed at step {step}: ") and "\n" not in line


@pytest.mark.parametrize(("step", "end"), [(40, 120), (100, 120), (40, 60)])
def test_a_theta_that_would_jump_is_refused_with_the_value_that_keeps_it(step, end):
    with pytest.raises(
        BadInput, match=f"with end_step 100 -> {end} RoPE theta would jump at step {step} from"
    ) as caught:
        check_changes(config(), config(end), step, schedules)
    start = float(str(caught.value).partition("rope.start_theta=")[2].split()[0])
    kept = config(end, theta=(start, 1e5))
    assert schedules(kept, step)[1] == pytest.approx(schedules(config(), step)[1], rel=1e-3)
    assert schedules(kept, end)[1] == pytest.approx(1e5)
    assert "rope.start_theta" in check_changes(config(), kept, step, schedules)


def test_a_rate_that_would_jump_is_refused_with_the_values_that_say_what_is_wanted():
    before, now = config(300, theta=FLAT), config(350, theta=FLAT, total_steps=350)
    with pytest.raises(
        BadInput,
        match="would jump at step 250 from 0.0005 to 0.000667: .*decay_start=250 "
        ".*peak_lr=0.00075 to stay",
    ) as caught:
        check_changes(before, now, 250, schedules)
    assert "end_step 300 -> 350, schedule.total_steps 300 -> 350" in str(caught.value)
    assert schedules(config(350, peak_lr=0.00075, theta=FLAT, total_steps=350), 250)[
        0
    ] == pytest.approx(5e-4)
    with pytest.raises(BadInput, match="would jump at step 300 from 0 to .*decay_start=300 "):
        check_changes(before, now, 300, schedules)


# ---- Where a run starts

RECORDS = pathlib.Path(__file__).parent / "records"


def record(name: str) -> Metadata:
    return Metadata.from_dict(json.loads((RECORDS / f"{name}.json").read_text()))


def save(workdir: pathlib.Path, metadata: Metadata) -> pathlib.Path:
    """A checkpoint with this record, and next to nothing else."""
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(metadata.step, {"params": {"x": np.zeros(1)}}, {}, metadata, b"")
    return workdir


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Workdirs named by their records."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("pretrain", "sft", "dpo", "imported"):
        save(root / name, record(name))
    return root


def origin_of(workdir, name: str, metadata: Metadata | None = None, **settings):
    """What `find_origin` finds for the run of a record, or one like it, with other settings."""
    metadata = metadata or record(name)
    about = {key: getattr(metadata, key) for key in ("tokenizer_sha256", "data_sha256")}
    config = ConfigDict(record(name).config)
    config.update_from_flattened_dict(settings)
    return find_origin(config, workdir, metadata.model, about)


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo"])
def test_a_run_resumes_from_its_own_checkpoint(saved, name):
    metadata = record(name)
    assert origin_of(saved / name, name, init_from="nowhere") == (saved / name, metadata.step)
    assert kept_windows(saved / name) == (metadata.shuffle_windows or None)
    for changed, message in (
        ({"model": dataclasses.replace(metadata.model, d_model=8)}, r"d_model=256 \(config: 8\)"),
        ({"model": dataclasses.replace(metadata.model, scan_layers=False)}, "scan_layers=True"),
        ({"tokenizer_sha256": "x"}, "was made with another tokenizer"),
        ({"data_sha256": "x"}, "was made with another data"),
    ):
        with pytest.raises(BadInput, match=message):
            origin_of(saved / name, name, dataclasses.replace(metadata, **changed))
    for setting, value in (("seed", 99), ("batch_size", 1), ("data.max_segments", 1)):
        with pytest.raises(BadInput, match=f"was trained with {setting}=.* the config has {value}"):
            origin_of(saved / name, name, **{setting: value})
    theta = {"rope.end_theta": 2e4}
    if name == "pretrain":
        assert origin_of(saved / name, name, **theta)
    else:
        with pytest.raises(BadInput, match="was trained with rope="):
            origin_of(saved / name, name, **theta)


def test_windows_that_an_earlier_version_did_not_record(tmp_path):
    metadata = record("earlier_pretrain")
    windows = kept_windows(save(tmp_path, metadata))
    assert windows.keys() == metadata.config["data"]["sources"].keys()
    assert kept_windows(tmp_path / "new") is None


def test_a_new_run_starts_from_scratch_or_from_another_run(saved, tmp_path):
    assert origin_of(tmp_path, "pretrain", init_from="") == (None, 0)
    later = {"start_step": record("pretrain").step, "init_from": str(saved / "pretrain")}
    assert origin_of(tmp_path, "pretrain", **later) == (saved / "pretrain", later["start_step"])
    imported = dataclasses.replace(record("imported"), data_sha256="x")
    other_layout = dataclasses.replace(imported.model, scan_layers=True)
    imported = dataclasses.replace(imported, model=other_layout)
    init_from = str(saved / "imported")
    found = origin_of(tmp_path, "pretrain", imported, init_from=init_from)
    assert found == (saved / "imported", 0) and kept_windows(saved / "imported") is None
    for settings, message in (
        (dict(init_from="", start_step=20), "starts at step 20: set init_from"),
        (dict(init_from=str(tmp_path)), "there is no checkpoint; name a workdir that has one"),
        (dict(init_from=str(saved / "pretrain")), "is at step 50 and .* starts at 0"),
        (dict(init_from=init_from), "has another model, vocab_size="),
    ):
        with pytest.raises(BadInput, match=message):
            origin_of(tmp_path, "pretrain", **settings)


def test_imported_weights_are_not_resumed_and_lost_checkpoints_are_noticed(saved, tmp_path):
    with pytest.raises(BadInput, match="holds imported weights: choose another workdir"):
        origin_of(saved / "imported", "pretrain", init_from="")
    shutil.copytree(saved / "pretrain", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost/checkpoints")
    with pytest.raises(BadInput, match="had a checkpoint of step 50 .*latest_checkpoint.json"):
        origin_of(tmp_path / "lost", "pretrain", init_from="")


def test_fine_tuning_starts_from_a_model_that_fits(saved, tmp_path):
    same = {"init_from": str(saved / "sft")}
    assert origin_of(tmp_path, "dpo", **same) == (saved / "sft", record("sft").step)
    for name, settings, message in (
        ("sft", dict(init_from=""), "starts from a trained model: set init_from"),
        ("sft", same, "its vocabulary is already extended for chat"),
        ("dpo", dict(init_from=str(saved / "pretrain")), "320 tokens, not the 328 of a chat model"),
        ("dpo", same | {"rope.end_theta": 2e4}, "was trained up to rope theta 10000.0: set"),
    ):
        with pytest.raises(BadInput, match=message):
            origin_of(tmp_path, name, **settings)
    for missing in ("", str(tmp_path)):
        with pytest.raises(BadInput, match="resuming needs the initial model"):
            reload_initial_params(missing, record("sft").model)


def test_new_rows_of_a_vocabulary_are_the_mean_of_the_old_ones():
    embedding = np.arange(6, dtype=np.float32).reshape(3, 2)
    params = {"embedding": {"kernel": embedding}, "head": {"kernel": embedding.T}, "other": 1}
    extended = extend_vocabulary(params, 5)
    np.testing.assert_array_equal(extended["embedding"]["kernel"][3:], [[2, 3], [2, 3]])
    np.testing.assert_array_equal(extended["head"]["kernel"], extended["embedding"]["kernel"].T)
    np.testing.assert_array_equal(extended["embedding"]["kernel"][:3], embedding)
    assert extended["other"] == 1 and len(embedding) == 3
