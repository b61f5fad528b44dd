"""What a recipe takes on GPUs that you may not have yet: memory by remat policy, the batch that fits, tokens a second, days, disk.

    python tools/plan.py --config configs/phase1.py --target h100 --devices 2
    python tools/plan.py --config configs/curriculum.py:1b --target h200 --devices 1 --config.stages.phase1.accumulation=2
    python tools/plan.py --config configs/phase1.py --devices 2 --compile h100_sxm.txtpb --remat gate_up    the compiler's figure beside ours

By arithmetic, in seconds. --compile FILE also compiles the real step for the target, without the GPU (jax 0.11 with its CUDA plugin; half a minute
each). FILE is XLA's description of the GPU: in openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb, h200.txtpb, a100_sxm_80.txtpb; or
what a process on such a GPU writes under --xla_dump_to.
"""

import dataclasses
import math
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # GPUs here are not asked
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin works without a driver
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from nanollama_jax import settings
from nanollama_jax.console import Table, console
from nanollama_jax.errors import BadInput, flags_parser, one_line_errors
from nanollama_jax.model.config import REMAT_POLICIES

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, as in configs/phase1.py:1b.", lock_config=True
)
TARGET = flags.DEFINE_enum(
    "target", "h100", ["h100", "h200", "a100"], "The kind of GPU (a100: of 80 GB)."
)
DEVICES = flags.DEFINE_integer("devices", 2, "How many of them.", lower_bound=1, upper_bound=2**16)
MFU = flags.DEFINE_float(
    "mfu",
    0.4,
    "The share of their peak to reckon with, by the causal count.",
    lower_bound=0.01,
    upper_bound=1.0,
)
COMPILE = flags.DEFINE_string(
    "compile", None, "XLA's description of the GPU, to compile the step for it."
)
REMAT = flags.DEFINE_enum(
    "remat", None, list(REMAT_POLICIES), "With --compile: this policy only. Default: all that fit."
)


def plan_stage(config: ConfigDict) -> None:
    from rich import box

    from nanollama_jax.planning import memory, plan
    from nanollama_jax.planning.compile_for import compile_for

    gpu, devices = plan.GPUS[TARGET.value], DEVICES.value
    model, shape = plan.settle_for(config, gpu, devices)
    limit, flops = plan.usable_bytes(gpu), model.flops_per_token(config.seq_len)
    rate = plan.tokens_per_second(model, config.seq_len, gpu, devices, MFU.value)
    tokens = (config.end_step - config.start_step) * config.tokens_per_step
    checkpoint, on_disk = plan.checkpoint_bytes(model), plan.checkpoints_kept(config)
    days = tokens / rate / 86_400
    duration = f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
    own_rows = config.batch_size // (config.accumulation * devices)
    lines = [
        f"{config.name}: {model.num_params:,} parameters on {devices} {TARGET.value}, {model.attention} attention, {model.dtype}",
        f"  a step: {config.batch_size} rows of {config.seq_len:,} tokens in {config.accumulation} micro-batch(es), {own_rows} rows a device each",
        f"  FLOPs a token: {flops / 1e9:.2f}e9, causal ({plan.nominal_flops(model, config.seq_len) / 1e9:.2f}e9 nominal)",
        f"  at {MFU.value:.0%} MFU: {rate:,.0f} tokens/s, {tokens / 1e9:,.2f}e9 tokens in {duration}",
        f"  disk: {checkpoint / 1e9:.1f} GB a checkpoint, {on_disk} kept at the end: {checkpoint * on_disk / 1e9:,.0f} GB; "
        f"{plan.bytes_per_token(config) * tokens / 1e9:,.0f} GB of tokenised text if none is read twice",
    ]
    if model.attention == "xla":
        lines.append(
            "  no flash attention for this model on this GPU (documents are masked on Hopper and later only): dense, slow and large"
        )
    table = Table(
        title=f"GB a device, of {limit / 1e9:.1f} that a run may use",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1),
        pad_edge=False,
    )
    columns = (
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
    for name in (*columns, *(("compiler", "ours / its") if COMPILE.value else ())):
        table.add_column(name, justify="left" if name == "remat" else "right")
    console.print("\n".join(lines))
    for remat in REMAT_POLICIES:
        of_policy = dataclasses.replace(model, remat=remat)
        took = memory.step_memory(of_policy, **shape)
        fits = took.total <= limit
        figures = (
            took.state,
            took.copy + took.gradients,
            took.kept,
            took.working,
            took.workspace,
            took.total,
        )
        row = [
            remat,
            *(f"{figure / 1e9:.1f}" for figure in figures),
            "yes" if fits else "no",
            f"{plan.most_rows(of_policy, limit, shape)}",
        ]
        if COMPILE.value and (remat == REMAT.value if REMAT.value else fits):
            compiled = compile_for(config, of_policy, devices, COMPILE.value)
            row += [f"{compiled.bytes / 1e9:.1f}", f"{took.compiled / compiled.bytes:.3f}"]
        table.add_row(*row)
    console.print(table)
    try:
        console.print(f"remat=auto takes {memory.fastest_remat(model, limit, **shape)}\n")
    except BadInput as error:
        console.print(f"{error}\n")


def main(_: list[str]) -> None:
    settings.apply()
    from nanollama_jax.curriculum import stages_of

    with one_line_errors():
        if REMAT.value and not COMPILE.value:
            raise BadInput("--remat goes with --compile: without it all policies are shown")
        if math.isnan(MFU.value):
            raise BadInput("--mfu=nan must be a number from 0.01 to 1")
        for stage in stages_of(CONFIG.value).values():
            plan_stage(stage)


if __name__ == "__main__":
    app.run(main, flags_parser=flags_parser(CONFIG))
