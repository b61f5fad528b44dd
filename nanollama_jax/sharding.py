"""The mesh, and where everything lies on it. This is the only module that names mesh axes.

Two axes: `data` replicates the model, `fsdp` shards parameters and optimizer state; the batch is split over both. On two GPUs fsdp=2, data=1.
The mesh is made with Auto axis types and entered with `jax.set_mesh`: linen's logical constraints want the first, and `with mesh:` makes linen
drop every constraint in silence (flax >= 0.12.2).
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

# Every logical axis, and the mesh axis it is split over. Parameters are split along the model width; what is None is whole on each device.
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
    """(data, fsdp) of a mesh of `devices`; fsdp=-1 means as many as `data` leaves. Raises BadInput if they do not fit."""
    if fsdp == -1:
        fsdp = max(1, devices // data)
    if data * fsdp != devices:
        raise BadInput(
            f"mesh.data={data} x mesh.fsdp={fsdp} needs {data * fsdp} devices and there are {devices}: "
            "set mesh.data to a divisor of that, and mesh.fsdp=-1 for the rest"
        )
    return data, fsdp


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp `devices` (default: all there are), as `mesh_shape` has it."""
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
    """NamedShardings for a tree of linen parameters that still carries logical axis names (from `jax.eval_shape` of init)."""
    return nn.logical_to_mesh_sharding(
        nn.get_partition_spec(boxed_params), mesh, LOGICAL_AXIS_RULES
    )


def shardings_like(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for `tree` (an optimizer state): a leaf whose path ends like a parameter's lies as that parameter does, others are replicated."""
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(shardings)
        )
    }

    def of(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree.map_with_path(of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of an array, its first axis, split over every device."""
    return NamedSharding(mesh, P(BATCH))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a global batch, of which every process has the whole, onto the mesh: each device takes its own rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }


def split_microbatches(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """(B, T) -> (count, B / count, T), each device keeping the rows it has: row i goes to micro-batch i % count, so nothing moves."""

    def split(array_BT):
        B, T = array_BT.shape
        return jax.lax.with_sharding_constraint(
            array_BT.reshape(B // count, count, T).swapaxes(0, 1), P(None, BATCH, None)
        )

    return jax.tree.map(split, batch)


def on_each_batch_shard(
    function: Callable, split_args: tuple[bool, ...], outputs: tuple[str, ...]
) -> Callable:
    """`function` run by each device on its own rows, weights whole: the form in which the loss gathers no activations.

    `split_args` says which arguments are split by rows. Of the `outputs`, "rows" stay with their device, "sum" are added up over all devices, and
    "sum_embed", shaped (D, ...) like a parameter split along D, are added up and left split so (a reduce-scatter).
    """

    def local(*args):
        results = []
        for kind, value in zip(outputs, function(*args), strict=True):
            if kind == "sum":
                value = jax.lax.psum(value, BATCH)
            elif kind == "sum_embed":
                value = jax.lax.psum(
                    jax.lax.psum_scatter(value, "fsdp", scatter_dimension=0, tiled=True), "data"
                )
            results.append(value)
        return tuple(results)

    in_specs = tuple(P(BATCH) if split else P() for split in split_args)
    out_specs = tuple(
        {"rows": P(BATCH), "sum": P(), "sum_embed": P("fsdp")}[kind] for kind in outputs
    )
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)


def differs_by_shard(tree: Any) -> Any:
    """Marks constants made inside `on_each_batch_shard` (the start of a sum) as differing between devices, as `jax.lax.scan` wants of its carry."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, BATCH, to="varying"), tree)
