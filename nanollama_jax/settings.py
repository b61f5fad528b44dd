"""XLA's flags and jax's environment, in one place.

Commands call `apply` before they import jax; values that the user has set are kept. XLA aborts the
process at an unknown flag, and its flags come and go, so each is passed only to versions known to
accept it (tests/test_settings.py starts the installed version with all of them). Flags that were
tried and left at their defaults: docs/performance.md, "XLA flags".
"""

import importlib.metadata
import os
import pathlib

# Share of a GPU's memory that is reserved at start-up. jax's default of 0.75 leaves 20 GB of an
# H100 unused; CUDA, cuDNN and NCCL need some outside it
MEMORY_FRACTION = 0.92
COMPILE_CACHE = pathlib.Path("~/.cache/nanollama-jax/compiled")


def xla_flags(jax_version: str, deterministic: bool) -> list[str]:
    """XLA flags for jax 0.10 and later."""
    # Beyond 0.8 of the memory XLA recomputes products on its own to save memory. Compiled for 2
    # H100s at remat=products: the loss's three times, and two more in each layer. 1.15 x 0.8 is
    # MEMORY_FRACTION; planning/memory.py decides what fits in it
    flags = ["--xla_gpu_memory_limit_slop_factor=115"]
    if tuple(map(int, jax_version.split(".")[:2])) < (0, 11):
        # Gathers weights asynchronously, during other work; the default from 0.11 on
        flags.append("--xla_gpu_enable_latency_hiding_scheduler=true")
    if deterministic:
        # Otherwise the embedding's gradient and cuDNN's query gradients are summed in the order in
        # which threads arrive
        flags.append("--xla_gpu_exclude_nondeterministic_ops=true")
    return flags


def apply(deterministic: bool = False) -> None:
    """Sets the environment. Must run before jax is imported, which reads it once.

    `deterministic`: the same command gives the same bits on a GPU too, more slowly (on a CPU it
    always does).
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only
    flags = xla_flags(importlib.metadata.version("jax"), deterministic)
    flags.append(os.environ.get("XLA_FLAGS", ""))  # last: the later of two values wins
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def keep_compiled() -> None:
    """Caches programs compiled for a GPU on disk, with XLA's autotuning: runs resume sooner.

    Not for a CPU: jax does not check that the CPU that loads a program is of the same kind.
    """
    import jax

    if jax.default_backend() == "gpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(COMPILE_CACHE.expanduser()))
