"""AdamW, and the schedules of the learning rate and RoPE theta: functions of the global step, so
that they continue across stages.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

NOT_DECAYED = ("embedding", "scale")  # embedding table and norms; every other parameter is a matrix


def make_optimizer(
    b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Clipping by global norm (0: none), Adam, and decoupled weight decay of matrices (Loshchilov &
    Hutter, arXiv:1711.05101). The updates are not scaled: the step multiplies them by minus the
    learning rate of the global step, which also counts skipped updates."""
    return optax.chain(
        # Neither has a state.
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """True where weight decay applies."""
    return jax.tree.map_with_path(
        lambda path, _: not any(key.key in NOT_DECAYED for key in path), params
    )


def wsd_schedule(
    step: jax.Array, peak: float, warmup_steps: int, decay_start: int, total_steps: int
) -> jax.Array:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): linear up to `peak` over `warmup_steps`,
    constant, then linear from `decay_start` to 0 at `total_steps`. Neither the first nor the last
    step has rate 0, which would waste it."""
    step = jnp.asarray(step, jnp.float32)
    up = (step + 1) / max(1, warmup_steps)
    down = (total_steps - step) / max(1, total_steps - decay_start)
    return peak * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)


def rope_theta_schedule(
    step: jax.Array, start_theta: float, end_theta: float, start_step: int, end_step: int, kind: str
) -> jax.Array:
    """RoPE theta after `step` updates. "ramp": log-linear over the stage, from `start_theta` to
    `end_theta`; "jump": `end_theta` from the start."""
    if kind == "jump":
        return jnp.float32(end_theta)
    done = jnp.clip(
        (jnp.asarray(step, jnp.float32) - start_step) / (end_step - start_step), 0.0, 1.0
    )
    return start_theta * jnp.float32(end_theta / start_theta) ** done


def schedules(config: dict[str, Any], step: int) -> tuple[float, float]:
    """Learning rate and RoPE theta of the update after `step` updates, by a config as JSON."""
    rate = wsd_schedule(step, config["optimizer"]["peak_lr"], **config["schedule"])
    rope = config["rope"]
    theta = rope_theta_schedule(
        step,
        rope["start_theta"],
        rope["end_theta"],
        config["start_step"],
        config["end_step"],
        rope["schedule"],
    )
    return float(rate), float(theta)
