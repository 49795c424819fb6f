"""Functions that run on every device of a mesh, each on its own part of the arrays.

Where the mesh divides the tokens of a cache (`seq`), every device holds as many, in order: it writes and reads those
that it holds, and what it cannot see it drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax import mesh as meshes
from kvjax.errors import KvjaxError

Result = TypeVar("Result")


def per_shard(
    function: Callable[..., Result], operands: tuple[Any, ...], axes: tuple[Any, ...], result: Any
) -> Result:
    """Runs a function on every device of the mesh in context, on that device's part of the operands.

    XLA cannot partition a kernel: without this it would gather the operands. A logical axis is divided where the mesh
    divides it in every operand that has it; elsewhere it is whole on every device.

    Args:
      function: takes the operands.
      operands: trees of arrays.
      axes: for each operand, a tree (or the upper part of it) of PartitionSpecs of logical names.
      result: the same of what the function returns.

    Returns:
      What the function returns. Without a mesh in context it is called as it is.

    Raises:
      KvjaxError: the mesh divides tokens, and not these.
    """
    mesh = meshes.current()
    if mesh is None:
        return function(*operands)
    whole: set[str] = set()

    def note(names: PartitionSpec, arrays: Any) -> None:
        for array in jax.tree.leaves(arrays):
            whole.update(n for n, size in zip(names, array.shape, strict=False) if n and size % meshes.parts(mesh, n))

    def divided(names: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(meshes.RULES[n] if meshes.parts(mesh, n, tuple(whole)) > 1 else None for n in names))

    jax.tree.map(note, axes, operands, is_leaf=meshes.is_axes)
    if "tokens" in whole:  # `first_token` would be wrong
        raise KvjaxError(
            f"the tokens of a cache do not divide over {meshes.describe(mesh)}; expected CacheShape.parts of its seq"
        )
    specs, out_specs = (jax.tree.map(divided, tree, is_leaf=meshes.is_axes) for tree in (axes, result))
    return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)(*operands)


def by_tokens(
    function: Callable[..., Result], operands: tuple[Any, ...], axes: tuple[Any, ...], result: Any
) -> Result:
    """`per_shard` where the mesh in context divides tokens; elsewhere the function as it is."""
    mesh = meshes.current()
    divided = mesh is not None and meshes.parts(mesh, "tokens") > 1
    return per_shard(function, operands, axes, result) if divided else function(*operands)


def token_parts() -> int:
    """Among how many devices the tokens of a cache are divided, asked by one of them; 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    axis = meshes.RULES["tokens"]
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def first_token(tokens: int) -> Int[Array, ""] | int:
    """The position of the first token that this device holds, of `tokens` that each holds."""
    return jax.lax.axis_index(meshes.RULES["tokens"]) * tokens if token_parts() > 1 else 0


def head_mean(x: Float[Array, "B K ..."]) -> Float[Array, "B 1 ..."]:
    """The mean over the kv heads, those of all devices where each holds some."""
    mean, axis = x.mean(1, keepdims=True), meshes.RULES["kv_heads"]
    return jax.lax.pmean(mean, axis) if axis in jax.sharding.get_abstract_mesh().manual_axes else mean
