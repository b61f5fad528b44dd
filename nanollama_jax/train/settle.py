"""Everything about a config that can be wrong, found before anything is allocated, each in one line that says what to change."""

import operator
from typing import Any

import jax
from ml_collections import ConfigDict

from nanollama_jax.checkpoint import TASKS
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.train.memory import fastest_remat

MARGIN = 0.95  # of a device's memory is what a step may need by arithmetic, which is right to 5 %


def settle(config: ConfigDict) -> ModelConfig:
    """The model's config, with `auto` settled for this machine. Raises BadInput."""
    c, devices = config, jax.device_count()
    if c.batch_size * c.seq_len != c.tokens_per_step:
        raise BadInput(
            f"batch_size={c.batch_size} x seq_len={c.seq_len} is {c.batch_size * c.seq_len} tokens and tokens_per_step={c.tokens_per_step}: "
            "change one, so that they agree"
        )
    if c.accumulation < 1 or c.batch_size % (devices * c.accumulation):
        raise BadInput(
            f"batch_size={c.batch_size} cannot be split over {devices} device(s) x accumulation={c.accumulation}: "
            f"make it a multiple of {devices * max(1, c.accumulation)}, or lower accumulation"
        )
    fsdp = c.mesh.fsdp if c.mesh.fsdp != -1 else devices // max(1, c.mesh.data)
    if fsdp > 0 and c.model.d_model % fsdp:
        raise BadInput(
            f"model.d_model={c.model.d_model} cannot be split over {fsdp} devices (mesh.fsdp): choose mesh.data and mesh.fsdp so that it can"
        )
    if not 0 <= c.start_step < c.end_step:
        raise BadInput(f"start_step={c.start_step} and end_step={c.end_step}: a stage must end after it starts")
    schedule = c.schedule
    if not schedule.warmup_steps <= schedule.decay_start <= schedule.total_steps or c.end_step > schedule.total_steps:
        raise BadInput(
            f"schedule: warmup_steps={schedule.warmup_steps} <= decay_start={schedule.decay_start} <= total_steps={schedule.total_steps} "
            f"and end_step={c.end_step} <= total_steps must hold"
        )
    if c.task not in TASKS:
        raise BadInput(f"task={c.task!r} is unknown: choose one of {', '.join(TASKS)}")
    if c.task != "pretrain" and not c.model.document_mask:
        raise BadInput(f"{c.task}: with model.document_mask=False the conversations of a row would see each other: leave it on")
    if c.task == "dpo" and (c.data.max_segments % 2 or not 0 <= c.preference.label_smoothing < 0.5 or c.preference.beta <= 0):
        raise BadInput("dpo: data.max_segments must be even, preference.beta above 0 and preference.label_smoothing at least 0 and below 0.5")
    if c.task == "dpo" and (c.loss.z_loss or c.gates.perplexity):
        raise BadInput("dpo has neither a z-loss nor a perplexity: set loss.z_loss=0.0 and gates.perplexity=()")
    if c.samples.every < 0 or c.samples.max_new_tokens < 1:
        raise BadInput("samples.every must be at least 0 and samples.max_new_tokens at least 1")
    if c.rope.schedule not in ("ramp", "jump"):
        raise BadInput(f"rope.schedule={c.rope.schedule!r} is unknown: choose ramp or jump")
    if not c.data.sources:
        raise BadInput("data.sources is empty: name at least one prepared corpus and its share in the recipe")
    if c.data.max_segments < 1:
        raise BadInput(f"data.max_segments={c.data.max_segments}: a row holds at least one document")
    for name in ("log_every", "validation.every", "validation.tokens", "checkpoint.every", "checkpoint.keep_last", "loss.chunk_tokens"):
        if (value := operator.attrgetter(name)(c)) < 1:
            raise BadInput(f"{name}={value} must be at least 1")
    for gate in c.gates.perplexity:
        if not isinstance(gate, tuple) or len(gate) != 3 or not gate[1] <= gate[2]:
            raise BadInput(f"gates.perplexity has {gate!r}: each is (step, go below, stop above)")
    if c.wandb.mode not in ("online", "offline", "disabled"):
        raise BadInput(f"wandb.mode={c.wandb.mode!r} is unknown: choose online, offline or disabled")

    model, device = dict(c.model), jax.devices()[0]
    if model["dtype"] == "auto":
        model["dtype"] = "bfloat16" if device.platform == "gpu" else "float32"
    if model["dtype"] not in ("float32", "bfloat16"):
        raise BadInput(f"model.dtype={model['dtype']!r} is unknown: choose auto, float32 or bfloat16")
    if model["attention"] == "auto":
        capability = float(device.compute_capability) if device.platform == "gpu" else 0.0
        model["attention"] = fastest_attention(model, capability)
    if c.task == "dpo" and model["attention"] == "cudnn_packed" and model["packed_documents"] < c.data.max_segments:
        raise BadInput(
            f"dpo: model.packed_documents={model['packed_documents']} and data.max_segments={c.data.max_segments}: attention would merge answers; "
            "make them equal"
        )
    if model["remat"] == "auto":
        model["remat"] = "full"
        if device.memory_stats():  # a CPU does not say what it has, and keeps the least
            limit = MARGIN * device.memory_stats()["bytes_limit"]
            model["remat"] = fastest_remat(ModelConfig(**model), limit, **step_shape(c, fsdp))
    return ModelConfig(**model)


def step_shape(config: ConfigDict, fsdp: int) -> dict[str, int]:
    """What `memory.step_memory` wants to know of a step."""
    return dict(
        rows=config.batch_size, seq_len=config.seq_len, accumulation=config.accumulation, fsdp=fsdp, data=config.mesh.data,
        chunk_tokens=config.loss.chunk_tokens,
    )  # fmt: skip


def fastest_attention(model: dict[str, Any], capability: float) -> str:
    """The fastest attention for a device of this CUDA compute capability (9.0: Hopper, 8.0: Ampere; 0: no GPU)."""
    flash = model["dtype"] == "bfloat16" and model["head_dim"] % 8 == 0 and model["head_dim"] <= 128
    if flash and model["document_mask"] and capability >= 9.0:
        return "cudnn_packed"
    if flash and not model["document_mask"] and capability >= 8.0:
        return "cudnn"
    return "xla"
