"""Our training step, as `main.py` runs it.

On a CPU against transformers + torch at nano scale; on a GPU by attention backend and remat policy.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case, Row
from benchmarks.documents import draw_batches, mean_context
from benchmarks.timing import median_and_spread
from configs import phase1
from nanollama_jax.recipes import MODELS

TOKENS = 65_536  # per step and GPU: half of phase 1's step, which is for two GPUs
WARM_UP = 2
PROFILED_STEPS = 3

# Attention, remat policy, micro-batches; the most important first. One micro-batch is 16 x 4096 or
# 4 x 16384 rows.
GPU_CASES = (
    ("cudnn_packed", "products", 2),
    ("cudnn_packed", "gate_up", 1),
    ("cudnn_packed", "none", 4),
    ("cudnn", "products", 2),
    ("cudnn_packed", "qkv", 1),
    ("cudnn", "gate_up", 1),
    ("cudnn_packed", "full", 1),
    ("cudnn_packed", "attention", 1),
    ("cudnn_packed", "products", 1),
    ("cudnn_packed", "gate_up", 2),
    ("cudnn", "none", 4),
    ("cudnn", "qkv", 1),
    ("cudnn", "full", 1),
)

GPU_COLUMNS = {
    "tokens_per_second": ("tokens/s/GPU", ",.0f"),
    "spread": ("+-", ".1%"),
    "step_seconds": ("step s", ".3f"),
    "mfu": ("MFU", ".1%"),
    "mfu_documents": ("MFU docs", ".1%"),
    "peak_gb": ("peak GB", ".1f"),
    "planned_gb": ("planned", ".1f"),
    "compile_seconds": ("compile s", ".0f"),
    "merged": ("merged", ".0f"),
    "loss": ("loss", ".3f"),
}
GPU_NOTES = (
    "MFU counts causal attention over whole rows (ModelConfig.flops_per_token); MFU docs counts it",
    "within documents, as computed. Neither counts recomputation. peak: maximum device memory;",
    "planned: arguments and temporaries, as the compiler counts them; GB are 1e9 bytes.",
    "merged: documents merged into their predecessor because model.packed_documents is too small.",
)


class Step(NamedTuple):
    """A compiled training step with a state of its own."""

    run: Callable[[int], dict[str, Any]]  # runs n steps to the end; returns the last one's metrics
    model: Any
    compile_seconds: float
    planned_bytes: int


def our_config(scale: str, seq_len: int, rows: int, accumulation: int = 1, **model: Any):
    """Phase 1's config of `scale` with other rows; `model` overrides its model."""
    config = phase1.get_config(scale)
    with config.unlocked():
        config.update(
            dict(
                seq_len=seq_len,
                batch_size=rows,
                tokens_per_step=rows * seq_len,
                accumulation=accumulation,
            )
        )
        config.model.update(model)
    return config


def our_step(config, batches: list[dict[str, np.ndarray]]) -> Step:
    """The program that the loop compiles for `config`, on all devices, fed `batches` in turn."""
    import jax

    from nanollama_jax import sharding
    from nanollama_jax.train import step as steps
    from nanollama_jax.train.settle import settle

    model = settle(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    with sharding.use_mesh(mesh):
        program = steps.program(config, model, mesh)
        started = time.perf_counter()
        update = program.update.lower(program.state_shapes, program.batch_shapes).compile()
        compile_seconds = time.perf_counter() - started
        state = program.make_state()
        placed = [sharding.put_batch(batch, mesh) for batch in batches]

    def run(n: int) -> dict[str, Any]:
        nonlocal state
        with sharding.use_mesh(mesh):
            for i in range(n):
                state, metrics = update(state, placed[i % len(placed)])
            return jax.block_until_ready(metrics)

    planned = update.memory_analysis()
    return Step(
        run, model, compile_seconds, planned.argument_size_in_bytes + planned.temp_size_in_bytes
    )


def measure_ours(
    *,
    scale: str,
    seq_len: int,
    rows: int,
    attention: str,
    remat: str,
    accumulation: int,
    rounds: int,
    steps: int,
    profile: str | None,
    **model: Any,
) -> Row:
    """A case: `rows` rows per GPU, with documents masked unless attention is `cudnn`.

    Finally traces a few steps into `profile`.
    """
    import jax

    from nanollama_jax.train.metrics import PEAK_FLOPS

    devices = jax.devices()
    model = dict(attention=attention, document_mask=attention != "cudnn", remat=remat) | model
    config = our_config(scale, seq_len, rows * len(devices), accumulation, **model)
    batches = draw_batches(2, config.batch_size, seq_len, config.model.vocab_size)
    step = our_step(config, batches)
    metrics = step.run(WARM_UP)
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        metrics = step.run(steps)
        rates.append(steps * rows * seq_len / (time.perf_counter() - started))
    rate, spread = median_and_spread(rates)
    row = {
        "tokens_per_second": rate,
        "spread": spread,
        "step_seconds": rows * seq_len / rate,
        "planned_gb": step.planned_bytes / 1e9,
        "compile_seconds": step.compile_seconds,
        "merged": float(metrics.get("merged_in_attention", 0)),
        "loss": float(metrics["loss"]),
        "device": devices[0].device_kind,
    }
    if memory := devices[0].memory_stats():
        row["peak_gb"] = memory["peak_bytes_in_use"] / 1e9
    if peak := next((value for kind, value in PEAK_FLOPS.items() if kind in row["device"]), None):
        row["mfu"] = rate * step.model.flops_per_token(seq_len) / peak
        if step.model.document_mask:
            context = statistics.mean(mean_context(batch["segment_ids"]) for batch in batches)
            row["mfu_documents"] = rate * step.model.flops_per_token(context) / peak
    if profile:
        with jax.profiler.trace(profile):
            step.run(PROFILED_STEPS)
    return row


def packed_documents(seq_len: int) -> int:
    """Room for the lengths of documents.py: 5 documents per 4,096-token row, 10 per 16,384."""
    return 8 if seq_len <= 4096 else 16


def case_of_ours(
    scale: str,
    seq_len: int,
    settings: list[tuple[str, str, int]],
    rounds: int,
    steps: int,
    profile: str | None = None,
) -> Case:
    """The first of `settings`, (attention, remat, micro-batches), that fits."""
    attention, remat, accumulation = settings[0]
    about = dict(
        scale=scale,
        seq_len=seq_len,
        rows=max(1, TOKENS // seq_len),
        rounds=rounds,
        steps=steps,
        profile=profile,
    )
    about["packed_documents"] = packed_documents(seq_len)
    attempts = tuple(
        about | dict(attention=attention, remat=remat, accumulation=accumulation)
        for attention, remat, accumulation in settings
    )
    return Case(
        f"ours, {attention}, remat {remat}, {accumulation} micro-batch{'es' * (accumulation > 1)}",
        measure_ours,
        attempts,
    )


def gpu_cases(scale: str, seq_len: int, rounds: int, steps: int, profile: str | None) -> list[Case]:
    """All cases; to profile, only the first."""
    return [
        case_of_ours(scale, seq_len, [setting], rounds, steps, profile)
        for setting in (GPU_CASES[:1] if profile else GPU_CASES)
    ]


def benchmark_on_cpu(rounds: int, steps: int) -> None:
    """Medians over rounds of `steps` steps of each in turn, so that a busy spell hits all."""
    from benchmarks.torch_peer import cpu_step

    shape, batch_size, seq_len = MODELS["nano"], 16, 256
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape["vocab_size"], (batch_size, seq_len + 1), dtype=np.int32)
    shape_BT = (batch_size, seq_len)
    two_documents = np.repeat([1, 2], seq_len // 2).astype(np.int32)
    positions = np.tile(np.arange(seq_len // 2, dtype=np.int32), 2)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones(shape_BT, np.float32),
        "segment_ids": np.broadcast_to(two_documents, shape_BT).copy(),
        "positions": np.broadcast_to(positions, shape_BT).copy(),
    }
    peers = {"transformers + torch": cpu_step(shape, tokens)}
    for remat in ("none", "products"):
        for scan_layers in (False, True):
            name = f"ours, remat {remat}, layers {'scanned' if scan_layers else 'unrolled'}"
            config = our_config("nano", seq_len, batch_size, remat=remat, scan_layers=scan_layers)
            peers[name] = our_step(config, [batch]).run
            peers[name](WARM_UP)
    rates = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            started = time.perf_counter()
            run(steps)
            rates[name].append(steps * batch_size * seq_len / (time.perf_counter() - started))
    baseline = statistics.median(rates["transformers + torch"])
    print(
        f"\nOne step of {batch_size} x {seq_len} tokens: forward, backward, clip, AdamW, in float32"
        f" (median of {rounds} rounds of {steps} steps)"
    )
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:36s} {rate:8,.0f} tokens/s  {rate / baseline:5.2f}x")
