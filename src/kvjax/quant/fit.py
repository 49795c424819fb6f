"""Scales and zero points that are chosen otherwise than from minimum and maximum."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, UInt8

from kvjax.quant.normal import uniform_step
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
    sums, count = _sums_of(x, counted, levels, axis)
    given = scale.astype(jnp.float32), zero.astype(jnp.float32)
    stored = lambda s, z: storable(s, z, levels, scale_bits)  # noqa: E731
    found = search.search(sums, *given, count, levels, x.shape[axis], divide, stored)
    return found[0].astype(jnp.float16), found[1].astype(jnp.float16)


def unbiased(
    x: Float[Array, "..."],
    counted: Bool[Array, "..."] | None,
    levels: Float[Array, ""],
    axis: int,
    scale: Float16[Array, "..."],
    zero: Float16[Array, "..."],
    scale_bits: int = 16,
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Scales and zero points to store beside codes that are taken with those of `least_squares`.

    Args:
      x: as in `least_squares`, like all others.
      counted: which entries count.
      levels: the largest code.
      axis: the axis of a group's entries.
      scale: scales that codes are taken with.
      zero: their zero points.
      scale_bits: 16 or 8.

    Returns:
      Scales and zero points with which what is read is as large as x on average (`least_squares.py`).
    """
    sums, count = _sums_of(x, counted, levels, axis)
    s, z = scale.astype(jnp.float32), zero.astype(jnp.float32)
    stretched = search.unbiased(s, z, sums(s, z), count, x.shape[axis], divide)
    wide, shifted = storable(*stretched, levels, scale_bits)
    fits = jnp.isfinite(wide) & jnp.isfinite(shifted)
    return jnp.where(fits, wide, s).astype(jnp.float16), jnp.where(fits, shifted, z).astype(jnp.float16)


def normal(
    x: Float[Array, "..."],
    counted: Bool[Array, "..."] | None,
    levels: Float[Array, ""],
    axis: int,
    scale_bits: int = 16,
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Scales and zero points whose levels, symmetric about 0, are the best for normal numbers as large as x.

    Args:
      x: groups along `axis`, in float32 or wider.
      counted: as in `least_squares`, like all others.
      levels: the largest code.
      axis: the axis of a group's entries.
      scale_bits: 16 or 8.

    Returns:
      Scales and zero points to take codes with.
    """
    steps = jnp.asarray([uniform_step(bits) for bits in range(1, 9)], jnp.float32)
    step = steps[jnp.round(jnp.log2(levels + 1)).astype(jnp.int32) - 1]
    count = x.shape[axis] if counted is None else jnp.maximum(counted.sum(axis, keepdims=True), 1)
    return _symmetric(step * _length(x, counted, axis) / jnp.sqrt(count), levels, scale_bits)


def with_length(
    x: Float[Array, "..."],
    counted: Bool[Array, "..."] | None,
    levels: Float[Array, ""],
    axis: int,
    codes: UInt8[Array, "..."],
    scale_bits: int = 16,
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Scales and zero points with which what is read is as long as x: TurboQuant's correction, made at the write.

    Args:
      x: as in `normal`, like all others.
      counted: which entries count.
      levels: the largest code.
      axis: the axis of a group's entries.
      codes: taken with the scales of `normal`.
      scale_bits: 16 or 8.
    """
    lengths = (_length(a, counted, axis) for a in (x, codes.astype(x.dtype) - levels / 2))
    return _symmetric(divide(*lengths), levels, scale_bits)


def _length(x: Float[Array, "..."], counted: Bool[Array, "..."] | None, axis: int) -> Float[Array, "..."]:
    squares = jnp.square(x) if counted is None else jnp.where(counted, jnp.square(x), 0)
    return jnp.sqrt(squares.sum(axis, keepdims=True))


def _symmetric(
    scale: Float[Array, "..."], levels: Float[Array, ""], scale_bits: int
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Scales and the zero points that put the levels symmetrically about 0; NaN where they do not fit."""
    scale = scale.astype(jnp.float32)
    stored = storable(scale, -scale * levels / 2, levels, scale_bits)
    fits = jnp.isfinite(stored[0]) & jnp.isfinite(stored[1])
    return tuple(jnp.where(fits, a, jnp.nan).astype(jnp.float16) for a in stored)  # type: ignore[return-value]


def whole_steps(
    scale: Float16[Array, "..."], zero: Float16[Array, "..."], levels: Float[Array, ""], scale_bits: int = 16
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """The same scales with zero points that are whole numbers of them, the nearest; all as in `least_squares`."""
    s, z = scale.astype(jnp.float32), zero.astype(jnp.float32)
    whole = jnp.where(s == 0, z, jnp.round(divide(z, jnp.where(s == 0, 1.0, s))) * s)
    wide, shifted = storable(s, whole, levels, scale_bits)
    return wide.astype(jnp.float16), shifted.astype(jnp.float16)


def _sums_of(
    x: Float[Array, "..."], counted: Bool[Array, "..."] | None, levels: Float[Array, ""], axis: int
) -> tuple[Callable[[Array, Array], search.Sums], Float[Array, "..."]]:
    """What adds up the groups' entries under a scale and a zero point, and how many entries count."""
    size = x.shape[axis]
    counted = jnp.ones(x.shape, bool) if counted is None else jnp.broadcast_to(counted, x.shape)

    def sums(s: Array, z: Array) -> search.Sums:
        each = search.entries(x, counted, s, z, levels, size, divide, jnp.round)
        add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
        # Whole numbers, so that a CPU's vector units may add them in any order. One reduction of all five: XLA's CPU
        # backend computes the entries anew for each that stands alone.
        whole = tuple(a.astype(jnp.int32) for a in each)
        found = jax.lax.reduce(whole, (jnp.int32(0),) * len(whole), add, (x.ndim + axis,))
        return search.Sums(*(jnp.expand_dims(a.astype(jnp.float32), axis) for a in found))

    return sums, counted.sum(axis, keepdims=True).astype(jnp.float32)
