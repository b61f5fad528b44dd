"""What a stage takes on GPUs other than those here: their figures, and arithmetic on them. `tools/plan.py` prints it."""

import dataclasses

from ml_collections import ConfigDict

from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.settings import MEMORY_FRACTION
from nanollama_jax.train.memory import step_memory
from nanollama_jax.train.metrics import PEAK_FLOPS
from nanollama_jax.train.settle import MARGIN, fastest_attention, step_shape


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
    """What `remat=auto` would fill, as train/settle.py reckons on the GPU itself."""
    return gpu.memory * MEMORY_FRACTION * MARGIN


def settle_for(config: ConfigDict, gpu: Gpu, devices: int) -> tuple[ModelConfig, dict[str, int]]:
    """The stage's model with `auto` settled for these GPUs (remat aside), and its step. Raises BadInput if the batch cannot be split over them."""
    data, fsdp = config.mesh.data, config.mesh.fsdp if config.mesh.fsdp != -1 else devices // config.mesh.data
    if data * fsdp != devices or config.batch_size % (devices * config.accumulation):
        raise BadInput(
            f"{config.name}: batch_size={config.batch_size} in accumulation={config.accumulation} micro-batches cannot be split over "
            f"--devices={devices} (mesh.data={data} x mesh.fsdp={fsdp}): change one of them"
        )
    model = dict(config.model) | {"remat": "full"}
    if model["dtype"] == "auto":
        model["dtype"] = "bfloat16"
    if model["attention"] == "auto":
        model["attention"] = fastest_attention(model, gpu.capability)
    return ModelConfig(**model), step_shape(config, fsdp)


def most_rows(model: ModelConfig, limit: float, shape: dict[str, int]) -> int:
    """The largest number of rows a device can take at a time."""
    devices, rows = shape["fsdp"] * shape["data"] * shape["accumulation"], 0
    while step_memory(model, **shape | {"rows": (rows + 1) * devices}).total <= limit:
        rows += 1
    return rows


def tokens_per_second(model: ModelConfig, seq_len: int, gpu: Gpu, devices: int, mfu: float) -> float:
    return mfu * gpu.peak * devices / model.flops_per_token(seq_len)


def nominal_flops(model: ModelConfig, seq_len: int) -> float:
    """PaLM's count (arXiv:2204.02311, appendix B), with which most published MFUs are reckoned: see `ModelConfig.flops_per_token`."""
    return 6.0 * model.num_params + 12.0 * model.num_layers * seq_len * model.num_heads * model.head_dim


def checkpoint_bytes(model: ModelConfig) -> int:
    """Parameters and both moments, float32."""
    return 12 * model.num_params


def checkpoints_kept(config: ConfigDict) -> int:
    """When the stage is done: the last few, and those kept for good."""
    every, first, last = config.checkpoint.keep_every, config.start_step, config.end_step
    for_good = {step for step in range(every, last + 1, every) if step > first} if every else set()
    recent = {step for step in range(config.checkpoint.every, last + 1, config.checkpoint.every) if step > first} | {last}
    return len(for_good | set(sorted(recent)[-config.checkpoint.keep_last :]))
