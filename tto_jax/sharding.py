"""Where arrays lie on a mesh: its axes, one table from parameter paths to PartitionSpecs, and the split of rows.

The model knows nothing of this beside three calls: `constrain` (where activations and caches lie), `split` (what each
device does with its own rows and heads alone) and `pad` (a vocabulary that the devices do not divide). Without a mesh
in context they do nothing.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tto_jax.core.types import Array

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # rows of a batch are split over both; weights over fsdp and tensor

# Path of an array of the model, at the end of a path in a state: how its dimensions are split. One pattern a path.
# `kv` and `vocab` mean `tensor` where it divides the KV heads, the vocabulary; elsewhere every device along it has all.
TABLE = (
    (r"embed\.embedding", P("vocab", "fsdp")),
    (r"position_embed\.embedding", P(None, "fsdp")),
    (r"layers\.attention\.q\.kernel", P(None, "fsdp", "tensor")),
    (r"layers\.attention\.q\.bias", P(None, "tensor")),
    (r"layers\.attention\.[kv]\.kernel", P(None, "fsdp", "kv")),
    (r"layers\.attention\.[kv]\.bias", P(None, "kv")),
    (r"layers\.attention\.out\.kernel", P(None, "tensor", "fsdp")),
    (r"layers\.(gate|up)\.kernel", P(None, "fsdp", "tensor")),
    (r"layers\.down\.kernel", P(None, "tensor", "fsdp")),
    (r"layers\.(attention\.[qk]|attention|mlp)_norm\.scale", P()),
    (r"norm\.scale", P()),
    (r"lm_head\.kernel", P("fsdp", "vocab")),
)


def mesh_of(shape: Sequence[int]) -> Mesh | None:
    """The mesh of a run; None where it is one device: then nothing is laid out, and the first device does it all."""
    if check_shape(shape) == (1, 1, 1) or (sorted(shape) == [-1, 1, 1] and jax.device_count() == 1):
        return None
    return make_mesh(shape)


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which jitted functions lay their arrays out on the mesh; for None one that does nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices; one size may be -1, the rest of the devices.

    Several slices are spanned by `data`, whose collectives are the rarest. Raises ValueError if the sizes do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _resolve(shape, len(devices))
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if sizes[0] % slices:
        raise ValueError(f"mesh={sizes}: data={sizes[0]} must be a multiple of the {slices} slices, which it spans")
    # By slice, then by process: a process owns consecutive rows. (An order by the torus would interleave hosts.)
    order = lambda device: (getattr(device, "slice_index", 0) or 0, device.process_index, device.id)  # noqa: E731
    grid = np.array(sorted(devices, key=order)).reshape(sizes)
    _check_processes(grid)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_processes(grid):
    """The rows of a process are graded there: it must own whole, consecutive parts of them."""
    owners = np.vectorize(lambda device: device.process_index)(grid).reshape(-1, grid.shape[2])
    if (owners != owners[:, :1]).any() or (np.diff(owners[:, 0]) < 0).any():
        raise ValueError(
            f"mesh={grid.shape}: tensor={grid.shape[2]} must lie within a process, which has "
            f"{len(jax.local_devices())} devices; processes along the rows are {owners.tolist()}"
        )


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """The sizes of a mesh as numbers; ValueError if they are none."""
    shape = tuple(shape)
    if len(shape) != len(AXES) or shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(f"mesh={shape}: give a size for each of {AXES}, positive, one of them -1 for the rest")
    return shape


def _resolve(shape, number):
    shape = check_shape(shape)
    known = math.prod(n for n in shape if n != -1)
    sizes = tuple(number // known if n == -1 else n for n in shape)
    if math.prod(sizes) != number:
        raise ValueError(f"mesh={shape} of {AXES} does not fit {number} devices: the sizes' product must be {number}")
    return sizes


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def shardings(mesh: Mesh, tree: Any, kv_heads: int, *, without: Sequence[str] = ()) -> Any:
    """NamedShardings of a tree of parameters, or of a state that holds such trees (moments), by `TABLE`.

    Args:
      mesh: of `AXES`.
      tree: arrays or `jax.ShapeDtypeStruct`s; scalars are replicated.
      kv_heads: of the model. Where `tensor` does not divide them, or the vocabulary, their weights lie without it: they
        keep their true shapes, and what the axis needs is made in the compute (`kv_copies`, `pad`).
      without: axes that are left out: the rollout's weights lie without `fsdp`.

    Raises:
      ValueError: paths that no pattern or several match, ranks and sizes that do not fit; all together.
    """
    wrong = []

    def axis_of(axis, size):
        if axis in ("kv", "vocab"):
            axis = None if {"kv": kv_heads, "vocab": size}[axis] % mesh.shape["tensor"] else "tensor"
        return None if axis in without or mesh.shape.get(axis) == 1 else axis

    def one(path, leaf):
        name, shape = jax.tree_util.keystr(path, simple=True, separator="."), np.shape(leaf)
        axes = [axis_of(axis, size) for axis, size in zip(_spec(name, shape, wrong), shape)]
        while axes and axes[-1] is None:  # one spelling a layout, so that a state keeps its types
            axes.pop()
        for size, axis in zip(shape, axes):
            if axis and size % mesh.shape[axis]:
                wrong.append(f"{name} {shape} with {P(*axes)}: {axis}={mesh.shape[axis]} does not divide {size}")
        return NamedSharding(mesh, P(*axes))

    found = jax.tree_util.tree_map_with_path(one, tree)
    if wrong:
        raise ValueError(f"{len(wrong)} arrays cannot be laid out on mesh {dict(mesh.shape)}:\n  " + "\n  ".join(wrong))
    return found


def _spec(name, shape, wrong):
    if not shape:
        return P()
    matches = [(pattern, spec) for pattern, spec in TABLE if re.fullmatch(rf"(.*\.)?{pattern}", name)]
    if len(matches) > 1:
        wrong.append(f"{name} {shape}: matched by {[pattern for pattern, _ in matches]}")
    if not matches:
        wrong.append(f"{name} {shape}: no pattern matches")
        return P()
    if len(matches[0][1]) > len(shape):
        wrong.append(f"{name} {shape}: its spec {matches[0][1]} has more dimensions")
        return P()
    return matches[0][1]


def constrain(x: Any, *axes: Any) -> Any:
    """`x` (an array or a tree) split as P(*axes), in the mesh of the context; `x` itself where there is none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P(*axes)), x)


def split(function: Callable, arrays: Any, specs: Any, out_specs: Any) -> Any:
    """`function(arrays, "tensor")` on what each device has of `arrays`; without a mesh `function(arrays, None)`.

    The second argument is the axis over which the function itself may communicate.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(arrays, None)
    run = lambda local: function(local, "tensor")  # noqa: E731
    return jax.shard_map(run, in_specs=(specs,), out_specs=out_specs)(arrays)


def kv_copies(heads: int, kv_heads: int, mesh: Mesh | None) -> int:
    """How often each KV head stands in activations and cache, so that `tensor` splits them; ValueError if it cannot."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    if heads % tensor:
        choices = tuple(n for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"tensor={tensor} does not divide the {heads} query heads: choose one of {choices}")
    return math.lcm(kv_heads, tensor) // kv_heads


def pad(x: Array, *axes: Any) -> jax.Array:
    """`x` with zeros at the end of the dimension that `tensor` splits, where it does not divide it: then P(*axes).

    Said here how it is split, the zeros and the parts are made on each device, before anything is gathered.
    """
    mesh, dimension = jax.sharding.get_abstract_mesh(), axes.index("tensor")
    missing = 0 if mesh.empty else -x.shape[dimension] % mesh.shape["tensor"]
    widths = [(0, missing if axis == dimension else 0) for axis in range(x.ndim)]
    return constrain(jnp.pad(x, widths), *axes) if missing else x


def place(mesh: Mesh | None, tree: Any, kv_heads: int, *, without: Sequence[str] = ()) -> Any:
    """Parameters, or a state that holds them, on the devices by `TABLE`; without a mesh on the first device."""
    return (
        jax.device_put(tree) if mesh is None else jax.device_put(tree, shardings(mesh, tree, kv_heads, without=without))
    )


def abstract(mesh: Mesh | None, tree: Any, kv_heads: int) -> Any:
    """`jax.ShapeDtypeStruct`s with their layout, for a restore."""
    if mesh is None:
        return tree
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(struct, tree, shardings(mesh, tree, kv_heads))


def put(tree: Any, *axes: Any) -> Any:
    """Host arrays on the devices of the context's mesh, split as P(*axes); without a mesh on the first device."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(tree) if mesh.empty else jax.device_put(tree, NamedSharding(mesh, P(*axes)))


def put_rows(tree: Any) -> Any:
    """Host arrays on the devices, the first dimension split over the row axes: each process gives its own rows."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or jax.process_count() == 1:
        return put(tree, ROWS)
    place = functools.partial(jax.make_array_from_process_local_data, NamedSharding(mesh, P(ROWS)))
    with jax.transfer_guard("allow"):  # this transfer is meant, but jax counts it among those that are not
        return jax.tree.map(lambda x: place(np.asarray(x)), tree)


def local_rows(tree: Any) -> Any:
    """The rows that lie on this process, in order, as host arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_local, _split_rows(tree))


def _split_rows(tree):
    return _splitter(jax.sharding.get_mesh())(tree)


@functools.cache
def _splitter(mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P(ROWS)))


def _local(x):
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])


def gather(tree: Any) -> Any:
    """Rows of all processes in order, as host arrays, on every process. tree: this process's rows as host arrays."""
    if jax.process_count() == 1:
        return tree
    with jax.transfer_guard("allow"):  # meant, also inside a training step, where resampling counts problems
        return multihost_utils.process_allgather(tree, tiled=True)


def whole_rows(number: int) -> int:
    """The least number of rows, `number` or more, that the context's mesh can split."""
    mesh = jax.sharding.get_mesh()
    return number if mesh.empty else -(-number // row_shards(mesh)) * row_shards(mesh)


def constrain_params(tree: Any, kv_heads: int, *, without: Sequence[str] = ()) -> Any:
    """A tree of parameters, or a state that holds such trees, laid out by `TABLE` in the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(mesh, tree, kv_heads, without=without))
