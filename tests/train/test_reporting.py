"""Gates decide, and the reporter records: metrics.jsonl, log lines and curves, W&B off."""

import json
import math

import pytest

from configs import dpo, phase1
from nanollama_jax.train import metrics
from nanollama_jax.train.hooks import gates
from nanollama_jax.train.tasks import task_of


@pytest.mark.parametrize(
    ("perplexity", "decided"),
    [(24.9, "go"), (25.0, "caution"), (30.0, "caution"), (30.1, "stop"), (math.nan, "stop")],
)
def test_what_a_gate_decides(perplexity, decided):
    assert gates.verdict(perplexity, go=25.0, stop=30.0) == decided


def test_a_gate_is_found_by_its_step_and_remembered(tmp_path):
    table = ((20, 25.0, 30.0), (40, 18.0, 22.0))
    assert gates.thresholds(table, 40) == (18.0, 22.0) and gates.thresholds(table, 30) is None
    assert not gates.passed(tmp_path, 20)
    for decided, passed in (("stop", False), ("caution", True), ("overridden", True), ("go", True)):
        gates.record(tmp_path, 20, decided)
        assert gates.passed(tmp_path, 20) == passed and not gates.passed(tmp_path, 40)
    gates.record(tmp_path, 40, "stop")
    assert gates.read(tmp_path) == {"20": "go", "40": "stop"}


def reporter(config, workdir, **changes):
    about = dict(step=-1, flops_per_token=1e6, device_kind="cpu", devices=1, is_main=True)
    about |= {name: config[name] for name in ("end_step", "log_every", "tokens_per_step")}
    return metrics.Reporter(config.name, task_of(config), workdir, **about | changes)


@pytest.fixture
def logged(caplog):
    """Log lines, whatever an earlier test set up."""
    metrics.log.setLevel("INFO")
    metrics.log.propagate = True
    return caplog


def test_steps_and_validations_are_recorded(tmp_path, logged):
    config = phase1.get_config("nano")
    config.update(batch_size=10, seq_len=100, log_every=2, end_step=4)
    made = reporter(config, tmp_path)
    values = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5}
    for step in (1, 2):
        made.step(step, values, seconds=0.5, data_seconds=0.2)
    made.validation(2, {"docs": {"loss": 1.0}, "all": {"loss": 1.0}})
    made.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, **values, "seconds": 0.5, "data_seconds": 0.2}
    assert rows[2]["validation_perplexity"]["docs"] == pytest.approx(math.e)
    lines = [record.getMessage() for record in logged.records]
    assert "step 2/4  loss 2.0000  ppl 7.4  lr 1.00e-03  grad 0.50  2,000 tokens/s" in lines[0]
    assert "40 %" in lines[1] and "docs 2.72" in lines[2]  # waited for data; perplexity
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "wandb").exists()


def test_dpo_reports_accuracy_and_margin(tmp_path, logged):
    config = dpo.get_config("nano")
    config.update(log_every=1)
    made = reporter(config, tmp_path)
    made.step(
        1,
        {"loss": 0.6, "lr": 1e-6, "grad_norm": 1.0, "accuracy": 0.75, "margin": 0.1, "kl": 0.0},
        seconds=1.0,
        data_seconds=0.0,
    )
    made.validation(1, {"pairs": {"loss": 0.6, "accuracy": 0.75, "margin": 0.1}})
    made.close()
    said = "\n".join(record.getMessage() for record in logged.records)
    assert said.count("accuracy 0.750  margin 0.100") == 2
    assert (tmp_path / "curves.png").exists()


def test_only_the_main_process_writes(tmp_path):
    made = reporter(phase1.get_config("nano"), tmp_path, is_main=False)
    made.step(1, {"loss": 2.0}, seconds=1.0, data_seconds=0.0)
    made.validation(1, {"docs": {"loss": 1.0}})
    made.close()
    assert not list(tmp_path.iterdir())
