"""DPO's objective against float64, where it starts, and that no mean is of means: rows of very unequal weight, micro-batches, two devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from nanollama_jax import sharding
from nanollama_jax.corpus.finetuning import SAID
from nanollama_jax.data.rows import Rows
from nanollama_jax.train import objectives, optimizer, reference, step
from nanollama_jax.train.feed import Feed
from nanollama_jax.train.losses import preference_loss, token_logprobs
from tests.model.oracle import random_params
from tests.train.test_step import ADAMW, TINY

MODEL = dataclasses.replace(TINY, num_layers=1)
T, SEGMENTS, CHUNK = 256, 10, 48
LEARNT = (1, 250, 3, 100, 2, 1, 200, 7)  # tokens of each row
PAIRS = (1, 5, 1, 2, 5, 1, 3, 5)  # of each row
THETA = np.float32(1e4)


@functools.cache
def params():
    """Float32, whatever the activations. Made outside of any mesh."""
    return jax.device_get(random_params(MODEL))


# ---- The loss


def float64_oracle(logprobs, reference, counts, beta, label_smoothing, length_normalised):
    """loss, accuracy, margin, rewards of the chosen and of the rejected: (pairs,) each, in float64."""
    logprobs, reference, counts = (
        np.asarray(x, np.float64).reshape(-1, 2) for x in (logprobs, reference, counts)
    )
    logprobs, reference, counts = (x[counts[:, 0] > 0] for x in (logprobs, reference, counts))
    rewards = beta * (logprobs - reference) / (counts if length_normalised else 1)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = (1 - label_smoothing) * np.log1p(np.exp(-margin)) + label_smoothing * np.log1p(
        np.exp(margin)
    )
    return loss, margin > 0, margin, *rewards.T


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.1, 0.0), (0.5, 0.1)])
def test_loss_agrees_with_float64(beta, label_smoothing, length_normalised):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, (6, 8)).astype(np.float32)
    counts[2:, 4:] = counts[5] = 0  # empty slots, and an empty row
    logprobs, of_reference = (-rng.uniform(0, 3, (6, 8)) * counts for _ in range(2))
    settings = (beta, label_smoothing, length_normalised)
    loss, d_logprobs, sums = preference_loss(
        *(jnp.asarray(x, jnp.float32) for x in (logprobs, of_reference, counts)), *settings
    )
    names = ("accuracy", "margin", "reward_chosen", "reward_rejected")
    expected = [each.sum() for each in float64_oracle(logprobs, of_reference, counts, *settings)]
    np.testing.assert_allclose([loss, *(sums[name] for name in names)], expected, rtol=1e-5)
    assert sums["weight"] == (counts[:, ::2] > 0).sum() == 14
    for row, column in ((0, 0), (1, 3), (4, 1), (3, 6)):  # the derivative, by differences
        shift = np.zeros_like(logprobs)
        shift[row, column] = 1e-4
        around = [
            float64_oracle(logprobs + sign * shift, of_reference, counts, *settings)[0].sum()
            for sign in (1, -1)
        ]
        assert d_logprobs[row, column] == pytest.approx(
            (around[0] - around[1]) / 2e-4, rel=1e-4, abs=1e-7
        )


def test_long_answers_are_summed_to_the_last_bit():
    """What DPO learns from is the small difference of two large sums: float32, added one by one, is off by several last bits."""
    rng = np.random.default_rng(0)
    hidden, head = (
        rng.normal(size=(2, 1024, 32)).astype(np.float32),
        rng.normal(size=(32, MODEL.vocab_size)).astype(np.float32),
    )
    segments = np.repeat([[1, 2, 3]], [600, 400, 24], 1).repeat(2, 0).astype(np.int32)
    batch = {
        "targets": rng.integers(0, MODEL.vocab_size, (2, 1024)).astype(np.int32),
        "segment_ids": segments,
        "loss_weights": (segments < 3).astype(np.float32),
    }
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        of_token = np.asarray(
            jax.jit(functools.partial(token_logprobs, chunk_tokens=CHUNK))(
                hidden, head, batch["targets"]
            )
        )
        found, counts = jax.jit(
            functools.partial(objectives.answer_logprobs, segments=4, chunk_tokens=CHUNK)
        )(hidden, head, batch)
    expected = np.stack(
        [np.where(segments == number, of_token, 0).astype(np.float64).sum(1) for number in (1, 2)],
        1,
    )
    assert counts.tolist() == [[600, 400, 0, 0]] * 2
    assert (
        np.abs(found[:, :2] - expected) <= np.spacing(np.abs(expected).astype(np.float32))
    ).all(), (found, expected)
    assert not found[:, 2:].any()


# ---- Batches


def side(rng, length: int, learned: int) -> np.ndarray:
    """Random ids of which the last `learned` are, a context of one at least before them."""
    ids = rng.integers(0, MODEL.vocab_size, length).astype(np.uint32)
    ids[length - learned :] |= SAID
    return ids


def conversations() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    units = [[side(rng, learned + 2, learned)] for learned in LEARNT]
    (batch,) = Rows(units, [[number] for number in range(len(units))], T, 4, pairs=False).batches(
        len(units)
    )
    assert batch["loss_weights"].sum(1).tolist() == list(LEARNT)
    return batch


def pair_rows() -> Rows:
    rng = np.random.default_rng(2)
    units = [
        [
            side(rng, learned + rng.integers(1, 9), learned)
            for learned in rng.choice([1, 2, 5, 15], 2)
        ]
        for _ in range(sum(PAIRS))
    ]
    ends = np.cumsum(PAIRS)
    return Rows(
        units,
        [list(range(end - count, end)) for end, count in zip(ends, PAIRS)],
        T,
        SEGMENTS,
        pairs=True,
    )


def pairs_with_reference() -> dict[str, np.ndarray]:
    """The reference is drawn, so that every pair has another loss."""
    rows = pair_rows()
    (batch,) = rows.batches(len(rows))
    learned = np.array(
        [[sum(ids >> 31) for ids in unit] for unit in rows.units], np.float64
    )  # a uint32 has no minus
    drawn = -learned * np.random.default_rng(3).uniform(3, 8, learned.shape)
    return reference.Reference(drawn.astype(np.float32), "").attach(batch)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 2), (2, 1)])
def test_the_reference_is_the_same_on_two_devices(data, fsdp, tmp_path):
    """Of two batches, the second filled up; the weights are recognised however they are laid out."""
    about = dict(
        name="dpo",
        init_from="",
        batch_size=6,
        accumulation=1,
        data=dict(max_segments=SEGMENTS),
        loss=dict(chunk_tokens=CHUNK),
    )
    feed, start, found = Feed({}, None, {}, [pair_rows()]), params(), []
    for folder, shape in (("one", (1, 1)), ("two", (data, fsdp))):
        (tmp_path / folder).mkdir()
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        with sharding.use_mesh(mesh):
            laid_out = functools.partial(jax.device_put, start, state_on(mesh, start)[1].params)
            found.append(
                reference.open_reference(
                    ConfigDict(about),
                    tmp_path / folder,
                    feed,
                    None,
                    laid_out,
                    MODEL,
                    float(THETA),
                    mesh,
                )
            )
    assert (
        found[0].weights == found[1].weights
        and found[0].logprobs.shape == (sum(PAIRS), 2)
        and (found[0].logprobs < 0).all()
    )
    np.testing.assert_allclose(*(each.logprobs for each in found), rtol=1e-5)


def test_every_change_of_the_data_or_the_weights_changes_their_fingerprint():
    def of_data(change) -> str:
        rows = pair_rows()
        change(rows.units)
        return reference.fingerprint(Feed({}, None, {}, [rows]))

    def another_token(units):
        units[1][0] = units[1][0] ^ np.eye(1, len(units[1][0]), 2, dtype=np.uint32)[0]

    def not_learnt(units):
        units[1][1] = units[1][1] & np.uint32(2**31 - 1)

    def other_sides(units):
        units[1].reverse()

    def other_order(units):
        units[:2] = units[1::-1]

    changes = (lambda units: None, another_token, not_learnt, other_sides, other_order)
    assert len({of_data(change) for change in changes}) == len(changes)
    start = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    others = [
        start,
        start | {"b": jnp.ones(3).at[1].set(1 + 2**-23)},
        start | {"a": start["a"][::-1]},
        start | {"a": start["a"].at[:, :2].set(0)},
    ]
    others += [
        start | {"a": start["a"][:, jnp.array([1, 0, 2])]},
        {"b": start["a"], "a": start["b"]},
    ]
    assert len({reference.checksum(params) for params in others}) == len(others)


OBJECTIVES = {
    "next_token": (
        functools.partial(objectives.next_token, model=MODEL, z_loss=1e-4, chunk_tokens=CHUNK),
        conversations,
    ),
    "preference": (
        functools.partial(
            objectives.preference,
            model=MODEL,
            chunk_tokens=CHUNK,
            beta=0.1,
            label_smoothing=0.1,
            length_normalised=False,
        ),
        pairs_with_reference,
    ),
}


def state_on(mesh, start):
    """That of training before its first step, and its shardings; the initialisers are not compiled, which takes longer than the tests."""
    _, _, shardings = step.init_state(MODEL, ADAMW, mesh, seed=0)
    state = step.TrainState(
        step=np.int32(0),
        skipped=np.int32(0),
        params=start,
        opt_state=jax.device_get(ADAMW.init(start)),
    )
    return jax.device_put(state, shardings), shardings


def train(name, data, fsdp, accumulation, steps=2):
    """The metrics of each step, and the parameters after them."""
    objective, make_batch = OBJECTIVES[name]
    batch, start = make_batch(), params()
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with sharding.use_mesh(mesh):
        state, shardings = state_on(mesh, start)
        run = functools.partial(
            step.train_step,
            objective=objective,
            optimizer=ADAMW,
            accumulation=accumulation,
            compute_dtype=MODEL.dtype,
            learning_rate=functools.partial(
                optimizer.wsd_schedule, peak=1e-3, warmup_steps=1, decay_start=15, total_steps=20
            ),
            rope_theta=lambda _: jnp.float32(THETA),
        )
        compiled = jax.jit(run, out_shardings=(shardings, sharding.replicated(mesh)))
        metrics = []
        for _ in range(steps):
            state, found = compiled(state, sharding.put_batch(batch, mesh))
            metrics.append(jax.device_get(found))
        return metrics, jax.device_get(state.params)


@functools.cache
def alone(name):
    return train(name, 1, 1, 1)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_loss_is_the_mean_over_all_tokens_or_pairs(name):
    """Of the whole batch at once; the mean of the rows' means is far from it, so that the next test can tell them apart."""
    objective, make_batch = OBJECTIVES[name]
    batch, start = make_batch(), params()
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        run = jax.jit(functools.partial(step.validation_step, objective=objective))
        rows = [
            run(start, {key: array[i : i + 1] for key, array in batch.items()}, THETA)
            for i in range(8)
        ]
    weights, losses = (
        np.array([row[key] for row in rows], np.float64) for key in ("weight", "loss")
    )
    assert weights.tolist() == list(LEARNT if name == "next_token" else PAIRS)
    found = alone(name)[0][0]
    assert found["loss"] == pytest.approx(losses.sum() / weights.sum(), rel=1e-5)
    assert found["learnt_tokens"] == batch["loss_weights"].sum()
    assert abs(found["loss"] / np.mean(losses / weights) - 1) > 1e-2


@pytest.mark.parametrize("length_normalised", [False, True])
def test_what_is_logged_is_that_of_float64(length_normalised):
    """Of the model's own log-probabilities; `kl` is per token of an answer, the mean of both sides."""
    batch, start = pairs_with_reference(), params()
    objective = functools.partial(
        objectives.preference,
        model=MODEL,
        chunk_tokens=CHUNK,
        beta=0.1,
        label_smoothing=0.1,
        length_normalised=length_normalised,
    )
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        sums = jax.jit(functools.partial(step.validation_step, objective=objective))(
            start, batch, THETA
        )
        ask = functools.partial(
            reference._logprobs, model=MODEL, segments=SEGMENTS, chunk_tokens=CHUNK
        )
        logprobs = jax.jit(ask)(start, batch, THETA)
    counts = np.stack(
        [
            (batch["loss_weights"] * (batch["segment_ids"] == number)).sum(1)
            for number in range(1, SEGMENTS + 1)
        ],
        1,
    )
    expected = [
        each.sum()
        for each in float64_oracle(
            logprobs, batch["reference_logprobs"], counts, 0.1, 0.1, length_normalised
        )
    ]
    names = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")
    np.testing.assert_allclose([sums[name] for name in names], expected, rtol=1e-4)
    difference = np.asarray(batch["reference_logprobs"], np.float64) - logprobs
    expected_kl = float((difference[counts > 0] / counts[counts > 0]).sum() / 2)
    assert sums["kl"] == pytest.approx(expected_kl, rel=1e-4) and abs(expected_kl) > 1


@pytest.mark.parametrize(("data", "fsdp", "accumulation"), [(1, 1, 4), (1, 2, 1), (2, 1, 4)])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_devices_and_microbatches_change_nothing(name, data, fsdp, accumulation):
    """AdamW does not see a constant factor in all gradients: their norm does."""
    (expected, trained), (found, ours) = alone(name), train(name, data, fsdp, accumulation)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, trained)
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), trained, params())))
        > 1e-3
    )


# ---- Where it starts


@pytest.mark.parametrize(("dtype", "accumulation"), [("float32", 1), ("bfloat16", 4)])
def test_at_the_reference_it_is_log_2(dtype, accumulation):
    """The reference in micro-batches of its own, the step as training has it."""
    model, rows = dataclasses.replace(MODEL, dtype=dtype), pair_rows()
    start = params()
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        state, shardings = state_on(mesh, start)
        settings = dict(
            rope_theta=THETA, mesh=mesh, batch_size=len(rows) // accumulation, chunk_tokens=CHUNK
        )
        logprobs = reference.pair_logprobs(state.params, [rows], model=model, **settings)
        assert (logprobs < 0).all()
        objective = functools.partial(
            objectives.preference,
            model=model,
            chunk_tokens=CHUNK,
            beta=0.1,
            label_smoothing=0.0,
            length_normalised=False,
        )
        run = functools.partial(
            step.train_step,
            objective=objective,
            optimizer=ADAMW,
            accumulation=accumulation,
            compute_dtype=dtype,
            learning_rate=lambda _: jnp.float32(1e-3),
            rope_theta=lambda _: jnp.float32(THETA),
        )
        (batch,) = rows.batches(len(rows))
        attached = reference.Reference(logprobs, "").attach(batch)
        _, metrics = jax.jit(run, out_shardings=(shardings, sharding.replicated(mesh)))(
            state, sharding.put_batch(attached, mesh)
        )
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected", "kl"):
        assert metrics[name] == pytest.approx(0, abs=1e-6), name
    assert metrics["grad_norm"] > 0 and metrics["logprob_chosen"] < 0
