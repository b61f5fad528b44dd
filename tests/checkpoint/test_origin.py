"""What a changed config does to learning rate and RoPE theta where a run is resumed."""

import pytest

from nanollama_jax.checkpoint.origin import changes, check_changes
from nanollama_jax.errors import BadInput
from nanollama_jax.train.optimizer import schedules


def config(end_step=100, peak_lr=1e-3, theta=(1e4, 1e5), kind="ramp", **schedule):
    """A phase from step 0; the rate falls from step 200 to 300."""
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
        match="would jump at step 250 from 0.0005 to 0.000667: .*decay_start=250 .*peak_lr=0.00075 to stay",
    ) as caught:
        check_changes(before, now, 250, schedules)
    assert "end_step 300 -> 350, schedule.total_steps 300 -> 350" in str(caught.value)
    assert schedules(config(350, peak_lr=0.00075, theta=FLAT, total_steps=350), 250)[
        0
    ] == pytest.approx(5e-4)
    with pytest.raises(BadInput, match="would jump at step 300 from 0 to .*decay_start=300 "):
        check_changes(before, now, 300, schedules)
