"""What a stage needs on GPUs that this machine does not have. `tools/plan.py` prints it."""

import bisect
import dataclasses

from ml_collections import ConfigDict

from nanollama_jax.config import check
from nanollama_jax.model import ModelConfig
from nanollama_jax.planning.memory import step_memory
from nanollama_jax.settings import MEMORY_FRACTION
from nanollama_jax.train.metrics import PEAK_FLOPS
from nanollama_jax.train.settle import (
    MARGIN,
    check_size,
    check_stage,
    derive,
    fastest_attention,
    step_shape,
)
from nanollama_jax.train.tasks import task_of


@dataclasses.dataclass(frozen=True)
class Gpu:
    memory: float  # bytes that the driver reports
    capability: float  # CUDA compute capability
    peak: float  # dense bf16 FLOP/s


GPUS = {
    "h100": Gpu(84.9e9, 9.0, PEAK_FLOPS["H100"]),
    "h200": Gpu(149.3e9, 9.0, PEAK_FLOPS["H200"]),
    "a100": Gpu(84.9e9, 8.0, PEAK_FLOPS["A100"]),
}


def usable_bytes(gpu: Gpu) -> float:
    """The memory that `remat=auto` plans for, as train/settle.py does on the GPU itself."""
    return gpu.memory * MEMORY_FRACTION * MARGIN


def settle_for(config: ConfigDict, gpu: Gpu, devices: int) -> tuple[ModelConfig, dict[str, int]]:
    """The stage's model with `auto` resolved for these GPUs (except remat), and the shape of its
    step. Raises BadInput."""
    check(config)
    config = derive(config)
    _, fsdp = check_stage(config, devices)
    model = dict(config.model) | {"remat": "full"}
    if model["dtype"] == "auto":
        model["dtype"] = "bfloat16"
    if model["attention"] == "auto":
        model["attention"] = fastest_attention(model, gpu.capability)
    settled = ModelConfig(**model)
    check_size(settled)
    return settled, step_shape(config, fsdp)


def most_rows(model: ModelConfig, limit: float, shape: dict[str, int]) -> int:
    """The largest number of rows a device can take at a time."""
    devices = shape["fsdp"] * shape["data"] * shape["accumulation"]
    needed = lambda rows: step_memory(model, **shape | {"rows": rows * devices}).total  # noqa: E731
    return bisect.bisect_right(range(1, 2**40), limit, key=needed)


def tokens_per_second(
    model: ModelConfig, seq_len: int, gpu: Gpu, devices: int, mfu: float
) -> float:
    return mfu * gpu.peak * devices / model.flops_per_token(seq_len)


def nominal_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs per token as PaLM counts them (arXiv:2204.02311, appendix B), the basis of most
    published MFUs. Compare `ModelConfig.flops_per_token`."""
    return (
        6.0 * model.num_params
        + 12.0 * model.num_layers * seq_len * model.num_heads * model.head_dim
    )


def checkpoint_bytes(model: ModelConfig) -> int:
    """Parameters and both moments, float32."""
    return 12 * model.num_params


def bytes_per_token(config: ConfigDict) -> int:
    """Size of a token in prepared data, before compression."""
    return task_of(config).bytes_per_token(config.model.vocab_size)


def checkpoints_kept(config: ConfigDict) -> int:
    """The largest number of checkpoints at the end of a stage: the last few, those that are kept
    permanently, and the one with the best validation."""
    every, for_good = config.checkpoint.every, config.checkpoint.keep_every
    first, last = config.start_step, config.end_step
    recent = [
        last,
        *range((last - 1) // every * every, first, -every)[: config.checkpoint.keep_last - 1],
    ]
    if not for_good:
        return len(recent) + 1
    return 1 + last // for_good - first // for_good + sum(step % for_good != 0 for step in recent)
