"""Settles a stage's config for this machine. What is wrong with it is found before anything is allocated,
each in one line that says what to change: single values by nanollama_jax/config.py, here what does not go
together."""

import dataclasses
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from nanollama_jax.config import check
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.planning.memory import fastest_remat
from nanollama_jax.sharding import mesh_shape

MARGIN = 0.95  # of a device's memory is what a step may need by arithmetic, which is right to 5 %
MAX_PARAMS = 10**11
MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def settle(config: ConfigDict) -> ModelConfig:
    """The model's config, with `auto` settled for this machine. Raises BadInput."""
    check(config)
    _, fsdp = check_stage(config, jax.device_count())
    c = config
    model, device = dict(c.model), jax.local_devices()[0]  # another process's has no memory_stats
    if model["dtype"] == "auto":
        model["dtype"] = "bfloat16" if device.platform == "gpu" else "float32"
    if model["attention"] == "auto":
        capability = float(device.compute_capability) if device.platform == "gpu" else 0.0
        model["attention"] = fastest_attention(model, capability)
    if (
        c.task == "dpo"
        and model["attention"] == "cudnn_packed"
        and model["packed_documents"] < c.data.max_segments
    ):
        raise BadInput(
            f"dpo: model.packed_documents={model['packed_documents']} and data.max_segments={c.data.max_segments}: attention would merge answers; "
            "make them equal"
        )
    stats, is_auto = device.memory_stats(), model["remat"] == "auto"  # a CPU has no stats
    settled = ModelConfig(**model | ({"remat": "full"} if is_auto else {}))
    check_size(settled)
    available = stats["bytes_limit"] * fsdp if stats else MACHINE_BYTES * jax.process_count()
    if (state := 12 * settled.num_params) > available:
        raise BadInput(
            f"parameters and optimizer need {state / 1e9:.1f} GB and there are {available / 1e9:.1f}: make the model smaller, or use more devices"
        )
    if is_auto and stats:
        remat = fastest_remat(settled, MARGIN * stats["bytes_limit"], **step_shape(c, fsdp))
        return dataclasses.replace(settled, remat=remat)
    return settled


def check_stage(config: ConfigDict, devices: int) -> tuple[int, int]:
    """(data, fsdp), a stage's mesh on so many devices. Raises BadInput for settings that do not go together."""
    c = config
    if c.batch_size * c.seq_len != c.tokens_per_step:
        raise BadInput(
            f"batch_size={c.batch_size} x seq_len={c.seq_len} is {c.batch_size * c.seq_len} tokens and tokens_per_step={c.tokens_per_step}: "
            "change one, so that they agree"
        )
    data, fsdp = mesh_shape(c.mesh.data, c.mesh.fsdp, devices)
    if c.batch_size % (devices * c.accumulation):
        raise BadInput(
            f"batch_size={c.batch_size} cannot be split over {devices} device(s) x accumulation={c.accumulation}: "
            f"make it a multiple of {devices * c.accumulation}, or lower accumulation"
        )
    if c.model.d_model % fsdp:
        raise BadInput(
            f"model.d_model={c.model.d_model} cannot be split over {fsdp} devices (mesh.fsdp): choose mesh.data and mesh.fsdp so that it can"
        )
    if c.start_step >= c.end_step:
        raise BadInput(
            f"start_step={c.start_step} and end_step={c.end_step}: a stage must end after it starts"
        )
    schedule = c.schedule
    if (
        not schedule.warmup_steps <= schedule.decay_start <= schedule.total_steps
        or c.end_step > schedule.total_steps
    ):
        raise BadInput(
            f"schedule: warmup_steps={schedule.warmup_steps} <= decay_start={schedule.decay_start} <= total_steps={schedule.total_steps} "
            f"and end_step={c.end_step} <= total_steps must hold"
        )
    if c.task != "pretrain" and not c.model.document_mask:
        raise BadInput(
            f"{c.task}: with model.document_mask=False the conversations of a row would see each other: leave it on"
        )
    if c.task == "dpo" and c.data.max_segments % 2:
        raise BadInput(f"dpo: data.max_segments={c.data.max_segments} must be even: a pair has two")
    if c.task == "dpo" and (c.loss.z_loss or c.gates.perplexity):
        raise BadInput(
            "dpo has neither a z-loss nor a perplexity: set loss.z_loss=0.0 and gates.perplexity=()"
        )
    if not c.data.sources:
        raise BadInput(
            "data.sources is empty: name at least one prepared corpus and its share in the recipe"
        )
    return data, fsdp


def check_size(model: ModelConfig) -> None:
    """Raises BadInput for sizes that are each allowed, and together beyond what this program is for."""
    if model.num_params > MAX_PARAMS:
        raise BadInput(
            f"the model has {model.num_params:.3g} parameters, at most {MAX_PARAMS:.0e} are possible: lower model.d_model or another size"
        )


def step_shape(config: ConfigDict, fsdp: int) -> dict[str, int]:
    """What `memory.step_memory` wants to know of a step."""
    return dict(
        rows=config.batch_size,
        seq_len=config.seq_len,
        accumulation=config.accumulation,
        fsdp=fsdp,
        data=config.mesh.data,
        chunk_tokens=config.loss.chunk_tokens,
    )


def fastest_attention(model: dict[str, Any], capability: float) -> str:
    """The fastest attention for a device of this CUDA compute capability (9.0: Hopper, 8.0: Ampere; 0: no GPU)."""
    flash = model["dtype"] == "bfloat16" and model["head_dim"] % 8 == 0 and model["head_dim"] <= 128
    if flash and model["document_mask"] and capability >= 9.0:
        return "cudnn_packed"
    if flash and not model["document_mask"] and capability >= 8.0:
        return "cudnn"
    return "xla"
