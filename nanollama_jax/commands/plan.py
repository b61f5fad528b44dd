"""Plan a run on GPUs that you do not have yet: memory, batch, days, disk.

    nanollama plan --config configs/phase1.py --target h100 --devices 2
    nanollama plan --config configs/curriculum.py:1b --target h200 --devices 1 \
--config.stages.phase1.accumulation=2
    nanollama plan --config configs/phase1.py --devices 2 --compile h100_sxm.txtpb --remat gate_up

The figures come from arithmetic, in seconds. --compile FILE also compiles the real step for the
target, without the GPU, and prints the compiler's figure beside ours; this needs jax 0.11 with its
CUDA plugin, and takes half a minute per policy. FILE is XLA's description of the GPU: one of
h100_sxm.txtpb, h200.txtpb and a100_sxm_80.txtpb in openxla/xla,
xla/backends/gpu/target_config/specs, or what a process on such a GPU writes with --xla_dump_to.
"""

import dataclasses
import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # leave the GPUs of this machine alone
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin works without a driver

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich import box

from nanollama_jax import settings
from nanollama_jax.command_line import flags_parser
from nanollama_jax.console import Table, console
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.config import REMAT_POLICIES

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with an optional scale: configs/phase1.py:1b.", lock_config=True
)
TARGET = flags.DEFINE_enum(
    "target", "h100", ["h100", "h200", "a100"], "The kind of GPU (a100: with 80 GB)."
)
DEVICES = flags.DEFINE_integer("devices", 2, "How many of them.", lower_bound=1, upper_bound=2**16)
MFU = flags.DEFINE_float(
    "mfu",
    0.4,
    "The share of peak FLOP/s to assume, with causal attention counted.",
    lower_bound=0.01,
    upper_bound=1.0,
)
COMPILE = flags.DEFINE_string(
    "compile", None, "XLA's description of the GPU, to compile the step for it."
)
REMAT = flags.DEFINE_enum(
    "remat", None, list(REMAT_POLICIES), "With --compile: only this policy. Default: all that fit."
)
COLUMNS = (
    "remat",
    "state",
    "gradients",
    "kept",
    "working",
    "cuDNN",
    "in all",
    "fits",
    "most rows",
)


def main() -> None:
    app.run(plan_all, flags_parser=flags_parser(CONFIG, __name__))


def plan_all(_: list[str]) -> None:
    settings.apply()
    from nanollama_jax.curriculum import stages_of

    with one_line_errors():
        if REMAT.value and not COMPILE.value:
            raise BadInput("--remat needs --compile: without it, all policies are shown")
        if math.isnan(MFU.value):
            raise BadInput("--mfu=nan must be a number from 0.01 to 1")
        for stage in stages_of(CONFIG.value).values():
            plan_stage(stage)


def plan_stage(config: ConfigDict) -> None:
    from nanollama_jax.planning import memory, plan

    gpu = plan.GPUS[TARGET.value]
    model, shape = plan.settle_for(config, gpu, DEVICES.value)
    limit = plan.usable_bytes(gpu)
    console.print(summary(config, model))
    table = Table(
        title=f"GB per device, of {limit / 1e9:.1f} that a run may use",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1),
        pad_edge=False,
    )
    for name in (*COLUMNS, *(("compiler", "ours / its") if COMPILE.value else ())):
        table.add_column(name, justify="left" if name == "remat" else "right")
    for remat in REMAT_POLICIES:
        table.add_row(*policy_row(config, dataclasses.replace(model, remat=remat), shape, limit))
    console.print(table)
    try:
        console.print(f"remat=auto takes {memory.fastest_remat(model, limit, **shape)}\n")
    except BadInput as error:
        console.print(f"{error}\n")


def summary(config: ConfigDict, model: ModelConfig) -> str:
    """Batch, FLOPs, time and disk space of a stage."""
    from nanollama_jax.planning import plan

    gpu, devices = plan.GPUS[TARGET.value], DEVICES.value
    flops = model.flops_per_token(config.seq_len)
    rate = plan.tokens_per_second(model, config.seq_len, gpu, devices, MFU.value)
    tokens = (config.end_step - config.start_step) * config.tokens_per_step
    checkpoint, kept = plan.checkpoint_bytes(model), plan.checkpoints_kept(config)
    days = tokens / rate / 86_400
    duration = f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
    device_rows = config.batch_size // (config.accumulation * devices)
    lines = [
        f"{config.name}: {model.num_params:,} parameters on {devices} {TARGET.value}, "
        f"{model.attention} attention, {model.dtype}",
        f"  step: {config.batch_size} rows of {config.seq_len:,} tokens in {config.accumulation} "
        f"micro-batch(es), each of {device_rows} rows per device",
        f"  FLOPs per token: {flops / 1e9:.2f}e9, causal "
        f"({plan.nominal_flops(model, config.seq_len) / 1e9:.2f}e9 nominal)",
        f"  at {MFU.value:.0%} MFU: {rate:,.0f} tokens/s, {tokens / 1e9:,.2f}e9 tokens in "
        f"{duration}",
        f"  disk: {checkpoint / 1e9:.1f} GB a checkpoint, {kept} kept at the end: "
        f"{checkpoint * kept / 1e9:,.0f} GB; {plan.bytes_per_token(config) * tokens / 1e9:,.0f} GB "
        "of tokenised text if none is read twice",
    ]
    if model.attention == "xla":
        lines.append(
            "  no flash attention for this model on this GPU (document masks need Hopper or later):"
            " dense attention, slow and memory-hungry"
        )
    return "\n".join(lines)


def policy_row(
    config: ConfigDict, model: ModelConfig, shape: dict[str, int], limit: float
) -> list[str]:
    """The row of `model.remat`: GB of each part of a step, and whether it fits in `limit` bytes."""
    from nanollama_jax.planning import memory, plan
    from nanollama_jax.planning.compile_for import compile_for

    used = memory.step_memory(model, **shape)
    fits = used.total <= limit
    parts = (
        used.state,
        used.copy + used.gradients,
        used.kept,
        used.working,
        used.workspace,
        used.total,
    )
    row = [
        model.remat,
        *(f"{part / 1e9:.1f}" for part in parts),
        "yes" if fits else "no",
        f"{plan.most_rows(model, limit, shape)}",
    ]
    if COMPILE.value and (model.remat == REMAT.value if REMAT.value else fits):
        compiled = compile_for(config, model, DEVICES.value, COMPILE.value)
        row += [f"{compiled.bytes / 1e9:.1f}", f"{used.compiled / compiled.bytes:.3f}"]
    return row
