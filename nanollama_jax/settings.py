"""XLA's flags and jax's environment, in one place. Commands call `apply` before they import jax; what the user has set already stays as it is.

XLA aborts the process at a flag it does not know, and its flags come and go, so each is given only to versions that were seen to take it
(tests/test_settings.py starts the installed one with all of them). Looked at and left at their defaults: docs/performance.md, "XLA flags".
"""

import importlib.metadata
import os
import pathlib

MEMORY_FRACTION = 0.92  # of a GPU's memory, taken at the start. jax's 0.75 leaves 20 GB of an H100 unused; CUDA, cuDNN and NCCL need some beside
COMPILE_CACHE = pathlib.Path("~/.cache/nanollama-jax/compiled")


def xla_flags(jax_version: str, deterministic: bool) -> list[str]:
    """For jax 0.10 and later."""
    # Beyond 0.8 of the memory XLA computes products again on its own to save some: compiled for 2 H100s at remat=products, the loss's three times and
    # two more in each layer. 1.15 x 0.8 is MEMORY_FRACTION; what fits in it is for planning/memory.py to say
    flags = ["--xla_gpu_memory_limit_slop_factor=115"]
    if tuple(map(int, jax_version.split(".")[:2])) < (0, 11):
        # Gathers weights beside other work instead of before it; from 0.11 the default. Compiled for 2 H100s: asynchronous instead of synchronous
        flags.append("--xla_gpu_enable_latency_hiding_scheduler=true")
    if deterministic:
        # Otherwise sums of the embedding's gradient and of cuDNN's query gradients run in the order in which threads arrive
        flags.append("--xla_gpu_exclude_nondeterministic_ops=true")
    return flags


def apply(deterministic: bool = False) -> None:
    """`deterministic`: the same bits from the same command, on a GPU too, where it is slower (a CPU gives them always). Must come before jax is
    imported: its first look at the environment is its last."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only
    flags = [
        *xla_flags(importlib.metadata.version("jax"), deterministic),
        os.environ.get("XLA_FLAGS", ""),
    ]  # of two the last counts
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def keep_compiled() -> None:
    """Programs compiled for a GPU are kept on disk, and XLA's measurements of its kernels with them: a run that resumes starts sooner. Not those
    for a CPU: jax does not look whether it is the same kind of CPU that loads them."""
    import jax

    if jax.default_backend() == "gpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(COMPILE_CACHE.expanduser()))
