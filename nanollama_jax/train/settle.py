"""Resolves a stage's config for this machine, and refuses what cannot run before anything is
allocated, each in one line that says what to change. nanollama_jax/config checks single values;
here are the rules between them.
"""

import dataclasses
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from nanollama_jax.config import Resolved, check, resolved
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.planning.memory import fastest_remat
from nanollama_jax.sharding import mesh_shape
from nanollama_jax.tokenizer import CHAT_TOKENS, Tokenizer

MARGIN = 0.95  # the part of a device's memory to plan for: the arithmetic is right to 5 %
MAX_PARAMS = 10**11
MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resolve(config: ConfigDict) -> Resolved:
    """A stage's config as it runs on this machine: checked, with `auto` and derived values filled
    in. Raises BadInput."""
    check(config)
    config = derive(config)
    data, fsdp = check_stage(config, jax.device_count())
    model = _model(config, fsdp)
    return resolved(config.to_dict() | {"mesh": {"data": data, "fsdp": fsdp}}, model)


def settle(config: ConfigDict) -> ModelConfig:
    """The resolved config's model."""
    return resolve(config).model


def derive(config: ConfigDict) -> ConfigDict:
    """A copy of a stage's config with what follows from its other values: tokens_per_step, and a
    vocabulary of 0. Raises BadInput where they contradict it."""
    config = ConfigDict(config.to_dict())
    tokens = config.batch_size * config.seq_len
    if (given := config.get("tokens_per_step", tokens)) != tokens:
        raise BadInput(
            f"tokens_per_step={given} is not batch_size={config.batch_size} x "
            f"seq_len={config.seq_len} = {tokens}: it is derived, do not set it"
        )
    config.tokens_per_step = tokens
    if config.model.vocab_size == 0:
        config.model.vocab_size = _pieces(config)
    if config.tokenizer.vocab_size == 0:
        config.tokenizer.vocab_size = config.model.vocab_size
    return config


def _pieces(config: ConfigDict) -> int:
    """The size of a stage's tokenizer, as it is or as preparation will make it."""
    path, base = config.tokenizer.path, config.tokenizer.base
    if os.path.exists(path):
        return Tokenizer(path).vocab_size
    if config.task != "pretrain" and os.path.exists(base):
        return extended_size(Tokenizer(base).vocab_size)
    if not config.tokenizer.vocab_size:
        raise BadInput(
            f"model.vocab_size=0 follows the tokenizer, and {path} is missing: set "
            "model.vocab_size, or tokenizer.path to a tokenizer that exists"
        )
    return config.tokenizer.vocab_size


def extended_size(vocab_size: int) -> int:
    """The vocabulary with the chat tokens, padded to a multiple of 8."""
    return -(-(vocab_size + len(CHAT_TOKENS)) // 8) * 8


def _model(c: ConfigDict, fsdp: int) -> ModelConfig:
    model, device = dict(c.model), jax.local_devices()[0]  # another process's has no memory_stats
    if model["dtype"] == "auto":
        model["dtype"] = "bfloat16" if device.platform == "gpu" else "float32"
    if model["attention"] == "auto":
        capability = float(device.compute_capability) if device.platform == "gpu" else 0.0
        model["attention"] = fastest_attention(model, capability)
    packed = model["packed_documents"]
    too_few = model["attention"] == "cudnn_packed" and packed < c.data.max_segments
    if c.task == "dpo" and too_few:
        raise BadInput(
            f"dpo: model.packed_documents={packed} and data.max_segments={c.data.max_segments}: "
            "attention would merge answers; make them equal"
        )
    stats, is_auto = device.memory_stats(), model["remat"] == "auto"  # a CPU has no stats
    settled = ModelConfig(**model | ({"remat": "full"} if is_auto else {}))
    check_size(settled)
    available = stats["bytes_limit"] * fsdp if stats else MACHINE_BYTES * jax.process_count()
    if (state := 12 * settled.num_params) > available:
        raise BadInput(
            f"parameters and optimizer need {state / 1e9:.1f} GB and there are "
            f"{available / 1e9:.1f}: make the model smaller, or use more devices"
        )
    if is_auto and stats:
        remat = fastest_remat(settled, MARGIN * stats["bytes_limit"], **step_shape(c, fsdp))
        return dataclasses.replace(settled, remat=remat)
    return settled


def check_stage(config: ConfigDict, devices: int) -> tuple[int, int]:
    """(data, fsdp): a stage's mesh on this many devices. Raises BadInput for settings that do not
    go together."""
    c = config
    data, fsdp = mesh_shape(c.mesh.data, c.mesh.fsdp, devices)
    if c.batch_size % (devices * c.accumulation):
        raise BadInput(
            f"batch_size={c.batch_size} cannot be split over {devices} device(s) x "
            f"accumulation={c.accumulation}: make it a multiple of {devices * c.accumulation}, or "
            "lower accumulation"
        )
    if c.model.d_model % fsdp:
        raise BadInput(
            f"model.d_model={c.model.d_model} cannot be split over {fsdp} devices (mesh.fsdp): "
            "choose mesh.data and mesh.fsdp so that it can"
        )
    if c.start_step >= c.end_step:
        raise BadInput(
            f"start_step={c.start_step} and end_step={c.end_step}: a stage must end after it starts"
        )
    warmup, decay, total = (
        c.schedule[key] for key in ("warmup_steps", "decay_start", "total_steps")
    )
    if not warmup <= decay <= total or c.end_step > total:
        raise BadInput(
            f"schedule: warmup_steps={warmup} <= decay_start={decay} <= total_steps={total} and "
            f"end_step={c.end_step} <= total_steps must hold"
        )
    if c.task != "pretrain" and not c.model.document_mask:
        raise BadInput(
            f"{c.task}: with model.document_mask=False the conversations of a row would see each "
            "other: leave it on"
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
    """Raises BadInput for sizes that are each allowed, but too large together."""
    if model.num_params > MAX_PARAMS:
        raise BadInput(
            f"the model has {model.num_params:.3g} parameters, at most {MAX_PARAMS:.0e} are "
            "possible: lower model.d_model or another size"
        )


def step_shape(config: ConfigDict, fsdp: int) -> dict[str, int]:
    """The arguments of `memory.step_memory` that describe a step."""
    return dict(
        rows=config.batch_size,
        seq_len=config.seq_len,
        accumulation=config.accumulation,
        fsdp=fsdp,
        data=config.mesh.data,
        chunk_tokens=config.loss.chunk_tokens,
    )


def fastest_attention(model: dict[str, Any], capability: float) -> str:
    """The fastest attention for a device of this CUDA compute capability (9.0: Hopper, 8.0: Ampere,
    0: no GPU)."""
    flash = model["dtype"] == "bfloat16" and model["head_dim"] % 8 == 0 and model["head_dim"] <= 128
    if flash and model["document_mask"] and capability >= 9.0:
        return "cudnn_packed"
    if flash and not model["document_mask"] and capability >= 8.0:
        return "cudnn"
    return "xla"
