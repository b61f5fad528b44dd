"""Schedules against the recipe's figures, and what weight decay leaves alone."""

import jax
import numpy as np
import pytest

from configs.curriculum import get_config
from nanollama_jax import sharding
from nanollama_jax.curriculum import stage_config, stage_names
from nanollama_jax.model import ModelConfig
from nanollama_jax.recipes import MODELS
from nanollama_jax.train import optimizer, step
from nanollama_jax.train.settle import settle


def test_wsd_of_the_1b_curriculum():
    schedule = get_config("1b").schedule
    lr = [
        float(optimizer.wsd_schedule(s, 6e-4, **schedule))
        for s in (0, 999, 1999, 100_000, 206_999, 207_000, 218_500, 229_999, 230_000)
    ]
    np.testing.assert_allclose(
        lr, [3e-7, 3e-4, 6e-4, 6e-4, 6e-4, 6e-4, 3e-4, 6e-4 / 23_000, 0], rtol=1e-5
    )


def pretraining(config):
    stages = [stage_config(config, name, "") for name in stage_names(config)]
    return [stage for stage in stages if stage.task == "pretrain"]


def test_rope_theta_ramps_over_phase_2_8k_and_jumps_if_asked():
    config = get_config("1b")
    thetas = []
    for stage in pretraining(config):
        options = dict(
            start_theta=stage.rope.start_theta,
            end_theta=stage.rope.end_theta,
            start_step=stage.start_step,
            end_step=stage.end_step,
        )
        thetas += [
            float(optimizer.rope_theta_schedule(s, **options, kind=stage.rope.schedule))
            for s in (stage.start_step, stage.end_step)
        ]
        assert (
            float(optimizer.rope_theta_schedule(stage.start_step, **options, kind="jump"))
            == stage.rope.end_theta
        )
    np.testing.assert_allclose(thetas, [1e4, 1e4, 1e4, 5e5, 5e5, 5e5, 5e5, 5e5], rtol=1e-5)
    middle = optimizer.rope_theta_schedule(189_000, 1e4, 5e5, 184_000, 194_000, "ramp")
    assert float(middle) == pytest.approx((1e4 * 5e5) ** 0.5, rel=1e-4)


def test_weight_decay_is_on_matrices_only():
    model = ModelConfig(**MODELS["nano"])
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    _, shapes, _ = step.init_state(
        model, optimizer.make_optimizer(0.9, 0.95, 1e-8, 0.1, 1.0), mesh, 0
    )
    decayed = {
        jax.tree_util.keystr(path)
        for path, yes in jax.tree.leaves_with_path(optimizer.decay_mask(shapes.params))
        if yes
    }
    assert decayed == {
        "['head']['kernel']",
        *(f"['layers']['attention']['{name}']['kernel']" for name in ("qkv", "o")),
        *(f"['layers']['ffn']['{name}']['kernel']" for name in ("gate_up", "down")),
    }


@pytest.mark.parametrize(
    ("clip_norm", "factor"), [(0, 1.0), (0.0, 1.0), (5.0, 0.5), (10.0, 1.0), (1e6, 1.0)]
)
def test_clip_norm_scales_gradients_down_and_0_leaves_them(clip_norm, factor):
    """With b1=b2=0 and a huge eps, Adam's updates are the gradients over eps."""
    grads = {"kernel": np.array([6.0, 8.0], np.float32)}  # of norm 10
    adamw = optimizer.make_optimizer(b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=clip_norm)
    state = adamw.init(grads)
    updates, _ = adamw.update(grads, state, grads)
    np.testing.assert_allclose(updates["kernel"] * 1e6, factor * grads["kernel"], rtol=1e-4)
    clipped = optimizer.make_optimizer(
        b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=1.0
    ).init(grads)
    assert jax.tree.structure(state) == jax.tree.structure(clipped)  # a run may turn it on or off


@pytest.mark.parametrize("scale", MODELS)
def test_every_scale_has_the_recipe_proportions(scale):
    config = get_config(scale)
    stages = pretraining(config)
    assert [s.name for s in stages] == ["phase1", "phase2_8k", "phase2_16k", "phase3"]
    assert [s.start_step for s in stages[1:]] == [s.end_step for s in stages[:-1]]
    assert all(s.batch_size * s.seq_len == s.tokens_per_step for s in stages)
    assert [s.seq_len // stages[0].seq_len for s in stages] == [1, 2, 4, 1]
    total = stages[-1].end_step
    shares = [(s.end_step - s.start_step) / total for s in stages]
    np.testing.assert_allclose(shares, [184 / 230, 10 / 230, 13 / 230, 23 / 230], atol=0.005)
    assert (
        config.schedule.decay_start == stages[-1].start_step
        and config.schedule.total_steps == total
    )
    model = config.model
    assert model.d_model % 256 == model.ffn_dim % 256 == 0


@pytest.mark.parametrize("scale", MODELS)
@pytest.mark.parametrize("devices", [1, 2])
def test_every_stage_of_every_scale_is_accepted_on_one_device_and_two(scale, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = get_config(scale)
    for name in stage_names(config):
        model = settle(stage_config(config, name, ""))
        assert (model.dtype, model.attention) == ("float32", "xla")


def test_1b_figures():
    config = get_config("1b")
    stages = pretraining(config)
    assert [(s.end_step, s.seq_len, s.batch_size) for s in stages] == [
        (184_000, 4096, 32),
        (194_000, 8192, 16),
        (207_000, 16_384, 8),
        (230_000, 4096, 32),
    ]
    assert sum((s.end_step - s.start_step) * s.tokens_per_step for s in stages) == 230_000 * 131_072
    assert stage_names(config)[4:] == ["sft", "dpo"]
    sft, dpo = (stage_config(config, name, "") for name in ("sft", "dpo"))
    assert (
        sft.end_step,
        sft.batch_size,
        sft.seq_len,
        sft.optimizer.peak_lr,
        sft.model.vocab_size,
    ) == (12_000, 8, 2048, 1e-5, 32_008)
    assert dict(sft.data.sources) == {"oasst2": 0.5, "metamath": 0.25, "hermes": 0.25}
    assert (dpo.end_step, dpo.batch_size, dpo.optimizer.peak_lr, dpo.preference.beta) == (
        5000,
        4,
        5e-7,
        0.1,
    )
