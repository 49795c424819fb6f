"""Where arrays live on several devices: logical axes of arrays to the axes of a mesh of devices.

Arrays name their axes by what they count (`batch`, `kv_heads`, ...). `RULES` say which axis of the mesh divides each;
all other axes are whole on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kvjax.errors import KvjaxError

AXES = ("data", "seq", "tensor")
RULES: Mapping[str, str] = MappingProxyType(
    {
        **{"batch": "data", "tokens": "seq"},
        **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor"),
    }
)


def current() -> AbstractMesh | None:
    """The mesh in context (`jax.set_mesh`), also while a program is traced.

    None where it has one device, where there is none, and inside `jax.shard_map`: arrays are one device's there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def parts(mesh: Mesh | AbstractMesh, axis: str | None, replicate: Sequence[str] = ()) -> int:
    """Into how many parts a mesh divides a logical axis; 1 where it is kept whole."""
    return 1 if axis is None or axis in replicate else mesh.shape.get(RULES[axis], 1)


def sharding(mesh: Mesh, axes: PartitionSpec, shape: Sequence[int], replicate: Sequence[str] = ()) -> NamedSharding:
    """Where an array of this shape lives.

    Args:
      mesh: the mesh.
      axes: logical names of its axes, None for one that is never divided.
      shape: its shape.
      replicate: logical axes that are kept whole.

    Returns:
      The sharding.

    Raises:
      KvjaxError: the size of a logical axis is no multiple of the size of its axis of the mesh.
    """
    for axis, size in zip(axes, shape, strict=False):
        if size % parts(mesh, axis, replicate):
            raise KvjaxError(
                f"{axis} {size} does not divide over {RULES[axis]}={mesh.shape[RULES[axis]]};"
                f" --config.replicate={axis} keeps it whole"
            )
    divided = (RULES[axis] if parts(mesh, axis, replicate) > 1 else None for axis in axes)
    return NamedSharding(mesh, PartitionSpec(*divided))
