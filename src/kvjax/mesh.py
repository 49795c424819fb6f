"""Where arrays live on several devices: a mesh from a line of text, and which axis of it divides which of an array.

Arrays name their axes by what they count (`batch`, `kv_heads`, ...). `RULES` say which axis of the mesh divides each;
all other axes are whole on every device. Without a mesh everything is on one device, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from kvjax import hosts
from kvjax.errors import KvjaxError
from kvjax.hosts import init_distributed as init_distributed  # part of what is said here of devices

AXES = ("data", "seq", "tensor")
AUTO = (AxisType.Auto,) * len(AXES)
PIECE = 2**25  # bytes of an array that are read at once
ALIGNMENT = 64  # bytes
RULES: Mapping[str, str] = MappingProxyType(
    {
        **{"batch": "data", "tokens": "seq"},
        **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor"),
    }
)
Index = tuple[slice, ...]
WHOLE = PartitionSpec()
BATCH = PartitionSpec("batch")  # axes of an array with a row per sequence


def parse(text: str) -> Mesh:
    """Makes a mesh of the first visible devices, of all devices where several processes share it.

    Args:
      text: sizes of axes, such as data=2,tensor=4; an axis that is not named has size 1.

    Returns:
      The mesh, with all three axes.

    Raises:
      KvjaxError: another axis, a size below 1, or fewer devices than the sizes multiply to, or more where each of
        several processes must have its part.
    """
    sizes, devices = _sizes(text), hosts.devices()
    needed = math.prod(sizes)
    if needed > len(devices):
        raise KvjaxError(f"mesh {text} needs {needed} devices; there are {len(devices)}")
    if needed < len(devices) and hosts.several():
        raise KvjaxError(
            f"mesh {text} has {needed} devices; expected all {len(devices)} of {hosts.count()} processes"
        )
    return jax.make_mesh(sizes, AXES, axis_types=AUTO, devices=devices[:needed])


def abstract(text: str) -> AbstractMesh:
    """The mesh of a text without its devices, which need not be there: for `part_nbytes`.

    Raises:
      KvjaxError: another axis, or a size below 1.
    """
    return AbstractMesh(_sizes(text), AXES, axis_types=AUTO)


def _sizes(text: str) -> tuple[int, ...]:
    """The size of each of AXES in the text of a mesh."""
    parts = [re.fullmatch(r"\s*(\w+)=([1-9]\d*)\s*", part) for part in text.split(",")]
    names = [part[1] for part in parts if part]
    if not all(parts) or not set(names) <= set(AXES) or len(set(names)) < len(names):
        raise KvjaxError(f"mesh {text!r}; expected sizes of {', '.join(AXES)}, as in data=2,tensor=4")
    named = {part[1]: int(part[2]) for part in parts if part}
    return tuple(named.get(axis, 1) for axis in AXES)


def describe(mesh: Mesh | AbstractMesh) -> str:
    """The text that `parse` takes, without axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"


def current() -> AbstractMesh | None:
    """The mesh in context (`jax.set_mesh`), also while a program is traced.

    None where it has one device, where there is none, and inside `jax.shard_map`: arrays are one device's there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def check(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int], replicate: Sequence[str] = ()) -> None:
    """Checks that a mesh divides axes.

    Args:
      mesh: the mesh.
      sizes: the size of every logical axis.
      replicate: logical axes that are kept whole.

    Raises:
      KvjaxError: the size of a logical axis is no multiple of the size of its axis of the mesh.
    """
    for axis, size in sizes.items():
        if size % parts(mesh, axis, replicate):
            divided = f"{RULES[axis]}={mesh.shape[RULES[axis]]}"
            whole = f"--config.replicate={','.join([*replicate, axis])} keeps {'them' if axis[-1] == 's' else 'it'}"
            raise KvjaxError(f"{axis} {size} does not divide over {divided}; {whole} whole")


def parts(mesh: Mesh | AbstractMesh, axis: str | None, replicate: Sequence[str] = ()) -> int:
    """Into how many parts a mesh divides a logical axis; 1 where it is kept whole."""
    return 1 if axis is None or axis in replicate else mesh.shape.get(RULES[axis], 1)


def sharding(
    mesh: Mesh | AbstractMesh, axes: PartitionSpec, shape: Sequence[int], replicate: Sequence[str] = ()
) -> NamedSharding:
    """Where an array of this shape lives.

    Args:
      mesh: the mesh.
      axes: logical names of its axes, None for one that is never divided.
      shape: its shape.
      replicate: logical axes that are kept whole.

    Returns:
      The sharding. Axes of the mesh that have size 1 are left out.

    Raises:
      KvjaxError: as `check`.
    """
    check(mesh, {axis: size for axis, size in zip(axes, shape, strict=False) if axis}, replicate)
    divided = (RULES[axis] if parts(mesh, axis, replicate) > 1 else None for axis in axes)
    return NamedSharding(mesh, PartitionSpec(*divided))


def part_nbytes(mesh: Mesh | AbstractMesh, axes: Any, arrays: Any, replicate: Sequence[str] = ()) -> int:
    """Bytes of a tree of arrays that each device holds.

    Args:
      mesh: the mesh.
      axes: the same tree of PartitionSpecs of logical axis names.
      arrays: the arrays, or their ShapeDtypeStructs.
      replicate: logical axes that are kept whole.

    Raises:
      KvjaxError: as `check`.
    """

    def of(names: PartitionSpec, array: Any) -> int:
        shape = sharding(mesh, names, array.shape, replicate).shard_shape(tuple(array.shape))
        return math.prod(shape) * array.dtype.itemsize

    return sum(jax.tree.leaves(_over(of, axes, arrays)))


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on the host, also where other processes hold parts of it; all processes must call it then."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, or one device where it is None, and the logical axes that are kept whole on it. Static under jit."""

    mesh: Mesh | None = None
    replicate: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: str | Mesh | None, replicate: str | Sequence[str] = ()) -> Layout:
        """The layout of a mesh or its text, and of a list of logical axes or its text.

        Raises:
          KvjaxError: it is no mesh, or there is no such axis.
        """
        names = [replicate] if isinstance(replicate, str) else replicate
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise KvjaxError(f"replicate={replicate!r}; expected a text or a list of {', '.join(RULES)}")
        whole = tuple(name.strip() for text in names for name in text.split(",") if name.strip())
        known = [name for name in RULES if name != "tokens"]  # a mesh without seq keeps them whole
        if unknown := [name for name in whole if name not in known]:
            raise KvjaxError(f"replicate={unknown[0]}; expected some of {', '.join(known)}")
        if isinstance(mesh, str):
            mesh = parse(mesh) if mesh else None
        if mesh is None and hosts.count() > 1:
            raise KvjaxError(
                f"{hosts.count()} processes and no mesh; expected one, as in data={len(hosts.devices())}"
            )
        if not isinstance(mesh, Mesh | None):
            raise KvjaxError(f"the mesh is of type {type(mesh).__name__}; expected a text or a jax.sharding.Mesh")
        if mesh is not None and not set(mesh.axis_names) <= set(AXES):
            raise KvjaxError(f"the mesh has axes {', '.join(mesh.axis_names)}; expected some of {', '.join(AXES)}")
        return cls(mesh, whole)

    def described(self) -> dict[str, str]:
        """What result rows say of it; nothing of one device."""
        whole = {"replicate": ",".join(self.replicate)} if self.replicate else {}
        return {} if self.mesh is None else {"mesh": describe(self.mesh)} | whole

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which programs are called, see `current`."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def parts(self, axis: str) -> int:
        """Into how many parts a logical axis is divided."""
        return 1 if self.mesh is None else parts(self.mesh, axis, self.replicate)

    def check(self, **sizes: int) -> None:
        """Raises KvjaxError where the size of a logical axis cannot be divided."""
        if self.mesh is not None:
            check(self.mesh, sizes, self.replicate)

    def sharding(self, axes: PartitionSpec, shape: Sequence[int]) -> NamedSharding | None:
        """Where an array of these logical axes lives; None: on one device, jax's default."""
        return None if self.mesh is None else sharding(self.mesh, axes, shape, self.replicate)

    def shardings(self, axes: Any, arrays: Any) -> Any:
        """`sharding` of every array of a tree (or its ShapeDtypeStruct); `axes` the same tree of PartitionSpecs."""
        return _over(lambda names, array: self.sharding(names, array.shape), axes, arrays)

    def constrain(self, arrays: Any, axes: Any) -> Any:
        """Tells the compiler where the arrays of a tree live; `axes` as for `shardings`."""
        return arrays if self.mesh is None else jax.lax.with_sharding_constraint(arrays, self.shardings(axes, arrays))

    def struct(self, axes: PartitionSpec, shape: Sequence[int], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """An array that is to be restored there, on the first device without a mesh."""
        where = self.sharding(axes, shape) or SingleDeviceSharding(hosts.devices()[0])
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=where)

    def structs(self, axes: Any, arrays: Any) -> Any:
        """`struct` of every array of a tree."""
        return _over(lambda names, array: self.struct(names, array.shape, array.dtype), axes, arrays)

    def build(
        self,
        shape: Sequence[int],
        dtype: DTypeLike,
        axes: PartitionSpec,
        read: Callable[[Index], np.ndarray],
        together: int = 1,
    ) -> jax.Array:
        """Makes an array whose parts go straight to their devices.

        Args:
          shape: its shape.
          dtype: its dtype.
          axes: logical names of its axes.
          read: returns the values at an index, a slice per axis; called for some MB at a time.
          together: a whole number of so many entries of the first axis is read at once.

        Returns:
          The array.
        """
        where = self.sharding(axes, shape)
        if where is None:
            return jax.device_put(_read_in_pieces(read, (slice(None),) * len(shape), shape, dtype, together))
        made: dict[tuple[int | None, ...], np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            key = tuple(each.start for each in index)  # devices that hold the same part
            if key not in made:
                made[key] = _read_in_pieces(read, index, shape, dtype, together)
            return made[key]

        return jax.make_array_from_callback(tuple(shape), where, part)


def _read_in_pieces(
    read: Callable[[Index], np.ndarray], index: Index, shape: Sequence[int], dtype: DTypeLike, together: int
) -> np.ndarray:
    """The values at an index, in memory of their own. On CPU, JAX keeps that memory and copies nothing.

    They are read a piece at a time, so that what a read needs besides, such as dequantised values, is small.
    """
    ranges = [each.indices(size) for each, size in zip(index, shape, strict=True)]
    whole = _aligned([stop - start for start, stop, _ in ranges], dtype)
    start, stop, _ = ranges[0]
    step = together * max(1, PIECE // max(1, whole[:together].nbytes))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        whole[first - start : last - start] = read((slice(first, last), *index[1:]))
    return whole


def _aligned(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """An array without values that begins where XLA's CPU buffers must begin, so that JAX need not copy it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _over(f: Callable[[PartitionSpec, Any], Any], axes: Any, arrays: Any) -> Any:
    return jax.tree.map(f, axes, arrays, is_leaf=is_axes)


def is_axes(node: Any) -> bool:
    """Whether a node of a tree names the axes of an array, and so is a leaf."""
    return isinstance(node, PartitionSpec)


ONE_DEVICE = Layout()
