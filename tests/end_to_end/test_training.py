"""A run is never lost: killed, stopped or moved to other devices, it resumes as if undisturbed."""

import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nanollama_jax import checkpoint
from nanollama_jax.train.metrics import read_rows
from tests.end_to_end.conftest import SOURCES, STAGES, TUNING, rows


def saved_state(workdir):
    """All arrays of the latest checkpoint, as numpy, by path."""
    _, step = checkpoint.find(workdir)
    restored = ocp.StandardCheckpointer().restore(
        workdir / "checkpoints" / f"step_{step}" / "state"
    )
    return step, {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(restored)
    }


def saved_positions(workdir):
    """The positions in its sources of the latest checkpoint."""
    _, step = checkpoint.find(workdir)
    return json.loads((workdir / "checkpoints" / f"step_{step}" / "data" / "metadata").read_text())[
        "positions"
    ]


def assert_bit_identical(workdir, other):
    step, state = saved_state(workdir)
    other_step, other_state = saved_state(other)
    assert step == other_step and state.keys() == other_state.keys()
    for path, array in state.items():
        np.testing.assert_array_equal(array, other_state[path], err_msg=path)


def validations(workdir):
    return [row for row in read_rows(workdir / "metrics.jsonl") if "validation_perplexity" in row]


def wait_for_step(process, curriculum, step):
    while last_logged_step(curriculum) < step:
        assert process.poll() is None, f"ended before step {step}\n" + "\n".join(
            process.communicate()
        )
        time.sleep(0.002)


def last_logged_step(curriculum):
    return max(
        (row["step"] for name in STAGES for row in read_rows(curriculum / name / "metrics.jsonl")),
        default=0,
    )


def test_killed_three_times_and_run_again_is_bit_identical(lab, undisturbed, tmp_path):
    """One kill falls near the end of phase 1, where a stage starts from another's checkpoint."""
    chance = random.Random()
    kills = sorted([chance.randrange(3, 35), chance.randrange(38, 44), chance.randrange(45, 76)])
    print("killed at steps", kills)  # shown if this fails
    for at in kills:
        process = lab.start("curriculum", tmp_path)
        wait_for_step(process, tmp_path, at)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    lab.run("curriculum", tmp_path)
    for name in STAGES:
        assert rows(tmp_path / name) == rows(undisturbed / name), name
        assert validations(tmp_path / name) == validations(undisturbed / name), name
        assert_bit_identical(tmp_path / name, undisturbed / name)
        assert saved_positions(tmp_path / name) == saved_positions(undisturbed / name)


def test_curriculum_leaves_what_it_promises(lab, undisturbed):
    assert rows(undisturbed / "phase1")[1]["loss"] == pytest.approx(np.log(320), rel=0.02)
    final = json.loads((undisturbed / "summary.json").read_text())
    assert final["stages"]["phase3"]["perplexity"]["docs"] < 0.5 * final["first_validation"]["docs"]
    for path in (undisturbed / "curves.png", undisturbed / "phase1" / "curves.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    read = {
        name: checkpoint.load(undisturbed / name).metadata.corpora for name in (*STAGES, *TUNING)
    }
    assert (
        read["phase1"] == read["phase2_16k"] == dict.fromkeys(("docs", "code", "reasoning"), "none")
    )  # as prepared
    assert read["phase3"] == dict.fromkeys(SOURCES, "none")
    assert read["sft"] == {"tools": "not stated", "math": "not stated"} and read["dpo"] == {
        "right_or_wrong": "not stated"
    }
    thetas = [row["rope_theta"] for name in STAGES for row in rows(undisturbed / name).values()]
    assert thetas[:41] == [1e4] * 41 and thetas == sorted(thetas) and thetas[60:] == [5e5] * 20
    learning_rates = [row["lr"] for name in STAGES for row in rows(undisturbed / name).values()]
    assert (
        len(learning_rates) == 80
        and max(learning_rates) == learning_rates[5] == pytest.approx(2e-3)
        and learning_rates[-1] == pytest.approx(2e-4)
    )
    about = checkpoint.read_metadata(undisturbed / "phase2_8k", 60)
    assert (about.phase, about.tokens_seen, about.model.d_model) == (
        "phase2_8k",
        60 * 256,
        32,
    )
    assert (
        about.rope_theta == pytest.approx(5e5)
        and len(about.tokenizer_sha256) == len(about.data_sha256) == 64
    )
    assert about.config["seq_len"] == 64
    step, state = saved_state(undisturbed / "phase3")
    # Each stage continues its sources where the last one that read them stopped, and remembers the
    # positions of those it does not read.
    positions = {name: saved_positions(undisturbed / name) for name in STAGES}
    assert positions["phase1"].keys() == {"docs", "code", "reasoning"} and positions[
        "phase3"
    ].keys() == set(SOURCES)
    for before, name in itertools.pairwise(STAGES):
        for source in positions[before]:
            there, here = (positions[stage][source]["at"] for stage in (before, name))
            if (
                source
                in checkpoint.read_metadata(undisturbed / name, STAGES[name][1]).config["data"][
                    "sources"
                ]
            ):
                assert here["parent"]["next_index"] > there["parent"]["next_index"], (name, source)
            else:
                assert here == there
    assert (
        step == 80 and state["['step']"] == 80 and state["['opt_state'][1]['count']"] == 80
    )  # the optimizer carries across phases


def test_again_when_finished_says_so_and_changes_nothing(lab, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert "Nothing left to do" in lab.run("curriculum", undisturbed)
    assert before == {
        path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_0_and_the_same_command_goes_on(lab, undisturbed, tmp_path, number):
    process = lab.start("curriculum", tmp_path)
    wait_for_step(process, tmp_path, 8)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stopped_at = last_logged_step(tmp_path)
    assert (
        checkpoint.find(tmp_path / "phase1")[1] == stopped_at < 40
        and f"stopped by a signal at step {stopped_at}" in out
    )
    assert f"resumed from {tmp_path / 'phase1'} at step {stopped_at}" in lab.run(
        "curriculum", tmp_path
    )
    assert_bit_identical(tmp_path / "phase3", undisturbed / "phase3")


def assert_close(workdir, other, name):
    """The same batches, and losses equal to 1e-5 for 40 steps; rounding grows tenfold after that."""
    ours, theirs = rows(workdir / name), rows(other / name)
    assert ours.keys() == theirs.keys()
    for step in ours:
        assert ours[step]["batch_crc32"] == theirs[step]["batch_crc32"]
        assert ours[step]["loss"] == pytest.approx(
            theirs[step]["loss"], rel=1e-5 if step <= 40 else 1e-3
        ), step


def test_goes_on_with_another_number_of_devices(lab, undisturbed, tmp_path):
    """1 to 2; 2 to 1 is below, with processes."""
    process = lab.start("curriculum", tmp_path)
    wait_for_step(process, tmp_path, 8)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    output = lab.run("curriculum", tmp_path, devices=2)
    assert "resumed from" in output and "on 2 cpu" in output
    for name in STAGES:
        assert_close(tmp_path, undisturbed, name)


def start_two(lab, workdir, *of_second: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    first = lab.start("phase1", workdir, *flags, "--process_id=0")
    return [first, lab.start("phase1", workdir, *flags, "--process_id=1", *of_second)]


def test_two_processes_that_disagree(lab, tmp_path):
    """Another batch size gives other shapes: compared too late, it hangs."""
    sizes = ["--config.batch_size=4", "--config.tokens_per_step=128", "--config.seed=5"]
    processes = start_two(lab, tmp_path / "phase1", *sizes)
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1, err
        assert "config.batch_size is 8 on process 0 and 4 on process 1" in err
        assert "config.seed" in err
    assert not (tmp_path / "phase1").exists()


def test_two_processes_train_what_one_does(lab, undisturbed, tmp_path):
    """One of them is killed on the way."""
    processes = start_two(lab, tmp_path / "phase1")
    wait_for_step(processes[0], tmp_path, 8)
    processes[1].kill()
    processes[1].communicate()
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and err.count("\n") == 1, err
    assert err.startswith("error: process 1 of 2 is gone") and "rerun the same command" in err
    processes = start_two(lab, tmp_path / "phase1")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resumed from" in outputs[0][0]
    assert "on 2 cpu (data=1, fsdp=2)" in outputs[0][0] and "phase1" not in outputs[1][0]
    assert_close(tmp_path, undisturbed, "phase1")
    # what two processes saved, one goes on with
    assert "finished at step 40" in lab.run("phase1", tmp_path / "phase1")


def test_a_stop_gate_holds_the_run_until_told_otherwise(lab, tmp_path):
    gate = "--config.gates.perplexity=((20, 1.0, 2.0),)"
    said = lab.run("phase1", tmp_path, gate, expect=3)
    assert (
        "gate at step 20" in said and "enforce=False" in said and checkpoint.find(tmp_path)[1] == 20
    )
    assert "gate at step 20" in lab.run("phase1", tmp_path, gate, expect=3)
    said = lab.run("phase1", tmp_path, gate, "--config.gates.enforce=False")
    assert "resumed from" in said and "finished at step 40" in said


def test_a_missing_summary_is_written_again(lab, undisturbed, tmp_path):
    """As after a kill between the last checkpoint and the summary."""
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert "validation perplexity of docs" in lab.run("curriculum", tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_bytes() == (
        undisturbed / "summary.json"
    ).read_bytes()


def test_old_checkpoints_go_and_every_kth_stays(lab, tmp_path):
    lab.run(
        "phase1", tmp_path, "--config.checkpoint.keep_last=2", "--config.checkpoint.keep_every=12"
    )
    kept = {
        int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*")
    }
    assert kept == {12, 24, 36, 40}


def test_wandb_offline_needs_no_account(lab, tmp_path):
    assert "W&B run: offline" in lab.run(
        "phase1", tmp_path, "--config.wandb.mode=offline", "--config.end_step=3"
    )
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
