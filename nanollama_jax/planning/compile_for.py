"""Compiles the training step for GPUs that this machine does not have, to see how much memory it
needs, what it gathers, and what it computes twice.
"""

import dataclasses
import os
import pathlib
import time

from jax.experimental import topologies
from ml_collections import ConfigDict

from nanollama_jax import sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.train import step


@dataclasses.dataclass(frozen=True)
class Compiled:
    bytes: int  # of one device at the peak, without cuDNN's workspace
    hlo: str  # the optimised program
    seconds: float


def compile_for(
    config: ConfigDict, model: ModelConfig, devices: int, target_config: str | os.PathLike
) -> Compiled:
    """Compiles a stage's step for `devices` GPUs of the kind described by the file `target_config`
    (XLA's GpuTargetConfigProto as text). Needs jax's CUDA plugin, 0.11 or later, but neither a GPU
    nor its driver. Matrix products are not autotuned. Raises BadInput if the plugin or the file is
    missing.
    """
    try:
        description = pathlib.Path(target_config).read_text()
        topology = topologies.get_topology_desc(
            topology_name="gpu",
            platform="cuda",
            target_config=description,
            topology=f"1x1x{devices}",
        )
    except OSError as error:
        raise BadInput(
            f"{target_config}: {error.strerror}: give XLA's description of the GPU (see "
            "tools/plan.py --help for where to get one)"
        ) from error
    except (NotImplementedError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(
            "compiling for GPUs needs jax 0.11 or later with its CUDA plugin (pip install "
            f"'jax[cuda13]'), on Python 3.12: {why}"
        ) from error
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=topology.devices)
    with sharding.use_mesh(mesh):
        started = time.monotonic()
        program = step.program(config, model, mesh)
        lowered = program.update.trace(program.state_shapes, program.batch_shapes).lower(
            lowering_platforms=("cuda",)
        )
        compiled = lowered.compile()
    m = compiled.memory_analysis()
    total = (
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )
    return Compiled(total, compiled.as_text(), time.monotonic() - started)
