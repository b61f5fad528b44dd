"""SFT and DPO as a user runs them: a killed run resumes bit for bit, and bad data or a bad starting
point is reported in one line.
"""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from nanollama_jax import checkpoint
from nanollama_jax.train.metrics import read_rows
from tests.end_to_end.conftest import rows
from tests.end_to_end.test_training import assert_bit_identical

BEFORE = {"sft": "phase3", "dpo": "sft"}
THETA = ("--config.rope.start_theta=500000.0", "--config.rope.end_theta=500000.0")


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_killed_in_its_midst_and_run_again_is_bit_identical(lab, undisturbed, tmp_path, task):
    flags = (
        task,
        tmp_path,
        f"--config.init_from={undisturbed / BEFORE[task]}",
        "--config.checkpoint.every=2",
    )
    process = lab.start(*flags)
    while max((row["step"] for row in read_rows(tmp_path / "metrics.jsonl")), default=0) < 5:
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = checkpoint.find(tmp_path)[1]
    assert 0 < step < {"sft": 12, "dpo": 8}[task]
    assert f"resumed from {tmp_path} at step {step}" in lab.run(*flags)
    assert rows(tmp_path) == rows(undisturbed / task)
    assert_bit_identical(tmp_path, undisturbed / task)


def test_what_a_curriculum_ends_with(lab, undisturbed):
    sft, dpo = (rows(undisturbed / task) for task in ("sft", "dpo"))
    assert sft[12]["loss"] < sft[1]["loss"] and sft[12]["lr"] < sft[2]["lr"]
    assert dpo[1]["loss"] == pytest.approx(np.log(2), abs=1e-6) and dpo[1][
        "margin"
    ] == pytest.approx(0, abs=1e-5)
    found = [
        row["validation"]["right_or_wrong"]
        for row in read_rows(undisturbed / "dpo" / "metrics.jsonl")
        if "validation" in row
    ]
    assert (
        len(found) == 2
        and found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
        and found[1]["loss"] < found[0]["loss"]
    )
    log = (undisturbed / "sft" / "log.txt").read_text()
    assert "step 12  asked: 'What is 12 + 7?'" in log and "step 12  says: " in log
    assert re.search(
        r"first row: \d+ segment\(s\), \d+ tokens learned: '<s><\|im_start\|>user\\n.*<\|im_end\|>",
        log,
    )
    loaded = checkpoint.load(undisturbed)
    assert (
        loaded.path.parent.parent.name == "dpo"
        and loaded.tokenizer.is_chat
        and loaded.model.vocab_size == 328
    )
    assert loaded.context_length == 256 and loaded.metadata.tokens_seen == 8 * 1024
    with np.load(undisturbed / "dpo" / "reference.npz") as reference:
        assert reference["logprobs"].shape == (400, 2) and (reference["logprobs"] < 0).all()


def test_a_run_starts_where_it_can(lab, undisturbed, tmp_path):
    def refused(task, start, *flags):
        return lab.run(
            task,
            tmp_path / "run",
            *([f"--config.init_from={undisturbed / start}"] if start else []),
            *flags,
            expect=2,
        )

    assert "starts from a trained model: set init_from" in refused("sft", "")
    assert "already extended for chat: SFT starts from a base model's checkpoint" in refused(
        "sft", "sft"
    )
    assert "of a chat model: name an SFT run of this scale" in refused("dpo", "phase3")
    assert "was trained up to rope theta 10000.0: set rope.start_theta=10000.0" in refused(
        "sft", "phase1"
    )
    assert "was trained up to rope theta 500000.0: set rope.start_theta=500000.0" in refused(
        "sft", "phase3", "--config.rope.start_theta=10000.0"
    )
    assert "the vocabulary is already extended" in refused(
        "sft", "phase3", f"--config.tokenizer.base={lab.root}/tokenizer_chat.model"
    )
    assert "conversations of a row would see each other" in refused(
        "sft", "phase3", "--config.model.document_mask=False"
    )
    assert "dpo has neither a z-loss nor a perplexity" in refused(
        "dpo", "sft", "--config.loss.z_loss=1e-4"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_reference_of_another_model_is_refused(lab, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dpo", tmp_path / "dpo")
    path, start = tmp_path / "dpo" / "reference.npz", f"--config.init_from={undisturbed / 'sft'}"
    with np.load(path) as reference:
        kept = dict(reference)
    np.savez(path, **kept | {"data": "0" * 64})
    assert "was computed with other data: set that back" in lab.run(
        "dpo", tmp_path / "dpo", start, expect=2
    )
    np.savez(path, **kept | {"kernels": "bfloat16, cudnn_packed attention"})
    assert (
        "was computed with bfloat16, cudnn_packed attention, and this run uses float32, xla"
        in lab.run("dpo", tmp_path / "dpo", start, expect=2)
    )
    path.write_bytes(b"PK")
    assert "is damaged" in lab.run("dpo", tmp_path / "dpo", start, expect=2)
    # gone on with, the run wants the model that it began with
    path.unlink()
    shutil.rmtree(tmp_path / "dpo" / "checkpoints" / "step_8")
    assert "set init_from to where" in lab.run("dpo", tmp_path / "dpo", expect=2)
    assert "is not the model that this run started from" in lab.run(
        "dpo", tmp_path / "dpo", f"--config.init_from={tmp_path / 'dpo'}", expect=2
    )
    assert "finished at step 8" in lab.run("dpo", tmp_path / "dpo", start)
    assert_bit_identical(tmp_path / "dpo", undisturbed / "dpo")
    np.savez(path, **kept | {"weights": "0" * 64})
    shutil.rmtree(tmp_path / "dpo" / "checkpoints")
    assert "had a checkpoint of step 8 and has none now" in lab.run(
        "dpo", tmp_path / "dpo", start, expect=2
    )
    (tmp_path / "dpo" / "latest_checkpoint.json").unlink()
    assert "was computed with another model" in lab.run("dpo", tmp_path / "dpo", start, expect=2)


def test_a_bad_row_ends_the_preparation_in_one_line(lab, tmp_path):
    """tests/corpus/test_finetuning.py has the other mistakes."""
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"question": "a", "answer": "b"}) + "\n" + json.dumps({"question": "a"}) + "\n"
    )
    extra = [
        f"--config.tuning.tools.url=file://{tmp_path}/rows.jsonl",
        f"--config.data.dir={tmp_path}",
    ]
    said = lab.tool("prepare_data", "sft", tmp_path, *extra, expect=2)
    assert (
        said.startswith(f"error: {tmp_path}/rows.jsonl:2: unknown format")
        and not (tmp_path / "tools" / "manifest.json").exists()
    )
