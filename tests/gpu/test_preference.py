"""DPO with cuDNN's attention, 60m shape: the reference is float32's, and step 1 is at it."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import dpo
from nanollama_jax import sharding
from nanollama_jax.corpus.finetuning import SAID
from nanollama_jax.data.rows import Rows, best_fit
from nanollama_jax.train import reference
from nanollama_jax.train import step as steps
from nanollama_jax.train.settle import settle
from tests.gpu import needs_gpu

pytestmark = needs_gpu
LENGTHS = (20, 60, 150, 400)  # of a side; its second half is learned


def test_the_first_step_is_at_the_reference(one_device):
    config = dpo.get_config("60m")
    model = settle(config)
    assert (model.attention, model.dtype) == ("cudnn_packed", "bfloat16")
    rows, rng = drawn_rows(config, model.vocab_size), np.random.default_rng(1)
    program = steps.program(config, model, one_device)
    state = program.make_state()
    batch_size, theta = config.batch_size, config.rope.end_theta
    settings = dict(
        rope_theta=theta,
        mesh=one_device,
        batch_size=batch_size,
        chunk_tokens=config.loss.chunk_tokens,
    )
    found = reference.pair_logprobs(state.params, [rows], model=model, **settings)
    with jax.default_matmul_precision("highest"):
        oracle = dataclasses.replace(model, attention="xla", dtype="float32")
        expected = reference.pair_logprobs(state.params, [rows], model=oracle, **settings)
    np.testing.assert_allclose(
        found, expected, rtol=2e-3
    )  # an answer's tokens have about 10.4 nats each, rounding to bfloat16 moves them by 0.02
    at_it = reference.Reference(found, "")
    for batch in list(rows.batches(batch_size))[
        :3
    ]:  # the learning rate is 0 at step 0: the first step changes nothing
        _, metrics = program.update(
            program.make_state(), sharding.put_batch(at_it.attach(batch), one_device)
        )
        assert (
            metrics["loss"] == pytest.approx(math.log(2), abs=1e-2)
            and abs(metrics["margin"]) < 2e-2
        )
        assert (
            metrics["merged_in_attention"] == metrics["update_skipped"] == 0
            and metrics["grad_norm"] > 0
        )
    apart = reference.Reference((found + rng.uniform(-20, 20, found.shape)).astype(np.float32), "")
    _, metrics = program.update(
        state, sharding.put_batch(apart.attach(next(rows.batches(batch_size))), one_device)
    )
    assert abs(metrics["loss"] - math.log(2)) > 2e-2, (
        "another reference gives the same loss, so agreeing says nothing"
    )


def drawn_rows(config, vocab_size: int) -> Rows:
    rng = np.random.default_rng(0)
    units = []
    for _ in range(64):
        sides = [
            rng.integers(0, vocab_size, length).astype(np.uint32)
            for length in rng.choice(LENGTHS, 2)
        ]
        for ids in sides:
            ids[len(ids) // 2 :] |= SAID
        units.append(sides)
    bins = best_fit(
        [sum(map(len, sides)) for sides in units], config.seq_len, config.data.max_segments // 2
    )
    return Rows(units, bins, config.seq_len, config.data.max_segments, pairs=True)
