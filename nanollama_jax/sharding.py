"""The mesh, and where everything lies on it. This is the only module that names mesh axes.

There are two axes: `data` replicates the model, `fsdp` shards parameters and optimizer state; the
batch is split over both. On two GPUs fsdp=2 and data=1. The mesh has Auto axis types, which linen's
logical constraints need, and is entered with `jax.set_mesh`: `with mesh:` makes linen silently drop
every constraint (flax >= 0.12.2).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanollama_jax.errors import BadInput

BATCH = ("data", "fsdp")

# Every logical axis and the mesh axis it is split over; None: whole on each device. Parameters are
# split along the model width.
LOGICAL_AXIS_RULES = (
    # activations
    ("batch", BATCH),
    ("length", None),
    ("act_embed", None),
    # parameters
    ("embed", "fsdp"),
    ("heads", None),
    ("kv_heads", None),
    ("head_dim", None),
    ("ffn", None),
    ("vocab", None),
    ("norm", None),  # a few KB: not worth a gather
    ("layers", None),
)


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """(data, fsdp) of a mesh of `devices`; fsdp=-1 takes all that `data` leaves.

    Raises BadInput if they do not fit.
    """
    if fsdp == -1:
        fsdp = max(1, devices // data)
    if data * fsdp != devices:
        raise BadInput(
            f"mesh.data={data} x mesh.fsdp={fsdp} needs {data * fsdp} devices and there are "
            f"{devices}: set mesh.data to a divisor of that, and mesh.fsdp=-1 for the rest"
        )
    return data, fsdp


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A data x fsdp mesh of `devices` (default: all); raises like `mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        mesh_shape(data, fsdp, len(devices)),
        BATCH,
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, linen's logical constraints and `jax.jit` see the mesh and the rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def param_shardings(boxed_params: Any, mesh: Mesh) -> Any:
    """NamedShardings of linen parameters that still carry logical axis names (boxed)."""
    specs = nn.get_partition_spec(boxed_params)
    return nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)


def shardings_like(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for `tree`, an optimizer state.

    A leaf whose path ends like a parameter's, and that has its shape, gets that parameter's
    sharding; others are replicated.
    """
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings))
    by_path = {path: (leaf.shape, sharding) for (path, leaf), sharding in leaves}

    def sharding_of(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree.map_with_path(sharding_of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis, rows, split over all devices."""
    return NamedSharding(mesh, P(BATCH))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a global batch, which every process has in full: each device takes its own rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }


def split_microbatches(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """(B, T) -> (count, B / count, T), without moving rows between devices.

    Row i goes to micro-batch i % count.
    """

    def split(array_BT):
        B, T = array_BT.shape
        return jax.lax.with_sharding_constraint(
            array_BT.reshape(B // count, count, T).swapaxes(0, 1), P(None, BATCH, None)
        )

    return jax.tree.map(split, batch)


def on_each_batch_shard(
    function: Callable, split_args: tuple[bool, ...], outputs: tuple[str, ...]
) -> Callable:
    """`function`, run by each device on its own rows with whole weights.

    In this form the loss gathers no activations. `split_args` says which arguments are split by
    rows. Of the `outputs`, "rows" stay on their device, "sum" are summed over all devices, and
    "sum_embed", shaped (D, ...) like a parameter split along D, are summed and left split along D
    (a reduce-scatter).
    """

    def local(*args):
        results = []
        for kind, value in zip(outputs, function(*args), strict=True):
            if kind == "sum":
                value = jax.lax.psum(value, BATCH)
            elif kind == "sum_embed":
                value = jax.lax.psum_scatter(value, "fsdp", scatter_dimension=0, tiled=True)
                value = jax.lax.psum(value, "data")
            results.append(value)
        return tuple(results)

    specs = {"rows": P(BATCH), "sum": P(), "sum_embed": P("fsdp")}
    in_specs = tuple(P(BATCH) if split else P() for split in split_args)
    out_specs = tuple(specs[kind] for kind in outputs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)


def differs_by_shard(tree: Any) -> Any:
    """Marks constants made inside `on_each_batch_shard` as differing between devices.

    `jax.lax.scan` requires it of its carry, such as the start of a sum.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, BATCH, to="varying"), tree)
