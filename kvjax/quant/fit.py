"""Scales and zero points that are fitted to their groups instead of taken from minimum and maximum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16

from kvjax.quant.scales import divide, storable
from pallas_kernels.quantize_pack import least_squares as search


def least_squares(
    x: Float[Array, "..."],
    counted: Bool[Array, "..."] | None,
    levels: Float[Array, ""],
    axis: int,
    scale: Float16[Array, "..."],
    zero: Float16[Array, "..."],
    scale_bits: int = 16,
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Searches the scales and zero points with the least squared error.

    Args:
      x: groups along `axis`, in float32.
      counted: which entries count; None where all do.
      levels: the largest code.
      axis: the axis of a group's entries, a negative number.
      scale: scales from minima and maxima, with 1 along `axis`; NaN where a group cannot be stored.
      zero: their zero points.
      scale_bits: 16 or 8, how candidates are rounded before they are compared.

    Returns:
      Scales and zero points, likewise; the given ones where no candidate has a smaller error.
    """
    size = x.shape[axis]
    counted = jnp.ones(x.shape, bool) if counted is None else jnp.broadcast_to(counted, x.shape)

    def sums(s: Array, z: Array) -> search.Sums:
        each = tuple(search.entries(x, counted, s, z, levels, size, divide, jnp.round))
        add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
        # One reduction of all five: XLA's CPU backend computes the entries anew for each that stands alone.
        found = jax.lax.reduce(each, (jnp.float32(0),) * len(each), add, (x.ndim + axis,))
        return search.Sums(*(jnp.expand_dims(a, axis) for a in found))

    count = counted.sum(axis, keepdims=True).astype(jnp.float32)
    given = scale.astype(jnp.float32), zero.astype(jnp.float32)
    stored = lambda s, z: storable(s, z, levels, scale_bits)  # noqa: E731
    found = search.search(sums, *given, count, levels, size, divide, stored)
    return found[0].astype(jnp.float16), found[1].astype(jnp.float16)
