"""When a run counts as diverged; what a stop says. tests/end_to_end/test_stopping.py has whole runs."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanollama_jax.train.hooks import divergence
from nanollama_jax.train.step import TrainState

CHANCE = math.log(4096)
FINE = {"update_skipped": 0}


def watched(losses, lowest=(), measure="loss"):
    watch = divergence.Watch(measure, 4096, dict(lowest))
    for step, loss in enumerate(losses, 1):
        watch.step(
            step,
            {"update_skipped": not math.isfinite(loss), measure: loss},
        )
    return watch


def state_of(weight=1.0, mu=0.0, nu=0.0):
    params = {"w": jnp.full((3, 3), 0.1).at[1, 1].set(weight)}
    opt_state = optax.scale_by_adam().init(params)
    opt_state = opt_state._replace(
        mu={"w": opt_state.mu["w"] + mu}, nu={"w": opt_state.nu["w"].at[2, 2].set(nu)}
    )
    return TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params=params,
        opt_state=(optax.EmptyState(), opt_state),
    )


def noisy(values):
    return [
        value + 0.3 * noise
        for value, noise in zip(
            values, np.random.default_rng(0).normal(size=len(values)), strict=True
        )
    ]


@pytest.mark.parametrize(
    "losses",
    [
        [CHANCE],
        noisy([CHANCE] * 40),  # learns nothing: nothing is lost
        noisy([7.6] * 20 + [8.6] * 20),  # too little learned to tell
        noisy(np.linspace(CHANCE, 2.5, 60)),
        [*noisy([3.0] * 30), 9.0, *noisy([3.0] * 5)],  # one bad batch
        [0.02] * 20 + noisy([3.0] * 20),  # another mix of sources
        noisy([3.0] * 20 + [4.5] * 20),  # another context length
    ],
)
def test_training_as_it_goes_is_no_divergence(losses):
    assert watched(losses).objection(state_of()) is None


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        (
            [3.0] * 20 + [CHANCE] * 20,
            "diverged: training loss 8.318 nats per token, after 3.00",
        ),  # a dead network
        (
            [3.0] * 20 + [2.9e6] + [3.0] * 5,
            "diverged: training loss 2.9e+05",
        ),  # has to hold for the last steps
        ([3.0, 3.0, 2.9e6], "diverged"),
        ([3.0] * 20 + [math.inf], "the last 1 update"),
        ([math.nan] * 4, "the last 4 update"),
    ],
)
def test_a_model_that_lost_what_it_had_learned_is_not_saved(losses, why):
    assert why in watched(losses).objection(state_of())


def test_recovery_ends_it():
    assert (
        watched([3.0] * 20 + [math.nan] * 3 + [9.0] * 10 + [3.5] * 20).objection(state_of()) is None
    )


def test_a_resumed_run_is_compared_with_what_it_was():
    assert watched([CHANCE] * 3).good_steps == 3
    watch = watched([CHANCE] * 3, {"training": 3.0})
    assert watch.good_steps == 0 and "diverged" in watch.objection(state_of())


def test_dpo_is_measured_by_how_unlikely_answers_became():
    assert watched([0.0, 0.1, 0.5, 1.5], measure="kl").objection(state_of()) is None
    assert "training kl" in watched([0.0, 0.1] + [7.0] * 20, measure="kl").objection(state_of())


@pytest.mark.parametrize(
    ("before", "now", "bad"),
    [(3.0, 3.5, False), (3.0, CHANCE, True), (3.0, math.nan, True), (CHANCE, CHANCE, False)],
)
def test_validations_are_compared_with_the_best(before, now, bad):
    watch = watched([])
    watch.validation({"loss": before})
    watch.validation({"loss": now})
    assert bool(watch.objection(state_of())) == bad
    watch.validation({"loss": before})
    assert watch.objection(state_of()) is None


@pytest.mark.parametrize(
    "bad",
    [
        dict(weight=math.nan),
        dict(weight=1e38),
        dict(mu=math.nan),
        dict(nu=math.nan),
        dict(nu=math.inf),
    ],
)
def test_a_state_that_is_not_finite_is_not_saved(bad):
    assert divergence.is_finite(state_of()) and divergence.is_finite(state_of(weight=1e15, nu=1e30))
    assert (
        watched([3.0]).objection(state_of(**bad)) == "parameters or optimizer state are not finite"
    )
