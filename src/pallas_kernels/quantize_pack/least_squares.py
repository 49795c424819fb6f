"""The search for the scale and the zero point that give a group the least squared error.

Candidates are the range that minimum and maximum span, narrowed about its middle, and then least-squares refits of
the best one to its own codes. Each is rounded as it is stored before its error is taken. The range
itself comes first, and another candidate must have a smaller error.

A search that compares sums must not depend on their order, or a token would be stored differently in a chunk than
alone, and differently by a kernel. So what is summed are whole numbers that float32 holds exactly: errors are taken
in steps of the candidate, cut and rounded. And no product is added to anything, because compilers fuse the two where
they like. Everything here is the same arithmetic in XLA and in every kernel, which give their own division and
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

CANDIDATES = 6  # parts of the range: 1, .92, .84, .76, .68, .6
REFITS = 3
WHOLE = 2.0**24  # float32 holds all whole numbers up to it

Divide = Callable[[Array, Array], Array]
Round = Callable[[Array], Array]
Stored = Callable[[Array, Array], tuple[Array, Array]]


class Sums(NamedTuple):
    """Of a group's entries that count, under a candidate; the entries themselves before they are summed.

    The first is the squared distance from the codes, the others are of codes c and distances e, in small parts of
    a step (`parts_of`).
    """

    squared: Float32[Array, "*s"]
    c: Float32[Array, "*s"]
    cc: Float32[Array, "*s"]
    e: Float32[Array, "*s"]
    ce: Float32[Array, "*s"]


def parts_of(size: int) -> tuple[float, float]:
    """Into how many parts a step and a squared step are divided, in groups of `size`: no sum exceeds WHOLE."""
    power_of_two = lambda x: 2.0 ** (math.frexp(x)[1] - 1)  # noqa: E731
    return power_of_two(WHOLE / (255 * size**1.5)), power_of_two(WHOLE / size**2)


def entries(
    x: Float32[Array, "*s"],
    counted: Bool[Array, "*s"],
    s: Float32[Array, "*s"],
    z: Float32[Array, "*s"],
    levels: Array | float,
    size: int,
    divide: Divide,
    rounded: Round,
) -> Sums:
    """What each entry gives to the sums of its group of `size`, under scale s and zero point z.

    Distances are cut at sqrt(size) steps. From minimum and maximum none exceeds 1/2, so that a candidate of at least
    half their scale with such an entry loses anyway.
    """
    most = size**0.5
    part, squared_part = parts_of(size)
    steps = divide(x - z, jnp.where(s > 0, s, 1.0))
    codes = rounded(jnp.clip(steps, 0.0, levels))
    off = jnp.where(counted, jnp.clip(steps - codes, -most, most), 0.0)
    c, e = jnp.where(counted, codes, 0.0), rounded(off * part)
    return Sums(rounded(off * off * squared_part), c, c * c, e, c * e)


def search(
    sums: Callable[[Array, Array], Sums],
    scale: Float32[Array, "*s"],
    zero: Float32[Array, "*s"],
    count: Float32[Array, "*s"],
    levels: Array | float,
    size: int,
    divide: Divide,
    stored: Stored,
) -> tuple[Float32[Array, "*s"], Float32[Array, "*s"]]:
    """Searches scales and zero points of groups.

    Args:
      sums: adds up `entries` of every group for a scale and a zero point.
      scale: from minimum and maximum, a number that float16 holds; NaN where a group cannot be stored.
      zero: likewise.
      count: how many entries of the group count.
      levels: the largest code.
      size: entries of a group.
      divide: the true quotient of two arrays of one shape.
      stored: what is stored for a scale and a zero point, numbers that float16 holds; not finite where it does not
        hold them.

    Returns:
      Scales and zero points that float16 holds; the given ones where no candidate has a smaller error.
    """
    part, squared_part = parts_of(size)
    count = jnp.maximum(count, 1.0)
    full = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.float32), scale.shape)  # noqa: E731

    def step(i: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        cut = full(2 * jnp.minimum(i, CANDIDATES - 1))
        narrowed = scale * divide(25 - cut, full(25)), zero + divide(scale * divide(cut, full(25)) * levels, full(2))
        s, z = stored(*(jnp.where(i < CANDIDATES, *pair) for pair in zip(narrowed, best[3:], strict=True)))
        found = sums(s, z)
        # Where float16 rounds the zero point by steps, distances are cut and cannot be compared: the range stays.
        rounded_by_steps = (i == 0) & (found.squared > count * squared_part)
        error = jnp.where(rounded_by_steps, 0.0, s * s * found.squared)
        # NaN is in no order: what cannot be stored is never better.
        better = (error < best[0]) & (s >= scale * 0.5) & (z - z == 0.0)
        return tuple(jnp.where(better, *pair) for pair in zip((error, s, z, *refit(s, z, found)), best, strict=True))

    def refit(s: Array, z: Array, found: Sums) -> tuple[Array, Array]:
        spread = found.cc - divide(found.c * found.c, count)
        along = found.ce - divide(found.c * found.e, count)
        spread = jnp.where(spread > 0, spread, jnp.inf)  # one code for all: nothing to turn
        offset = found.e - divide(along * found.c, spread)
        return s + divide(s * along, spread * part), z + divide(s * offset, count * part)

    start = (full(jnp.inf), scale, zero, scale, zero)
    _, scale, zero, _, _ = jax.lax.fori_loop(0, CANDIDATES + REFITS, step, start)
    return scale, zero


def unbiased(
    scale: Float32[Array, "*s"],
    zero: Float32[Array, "*s"],
    found: Sums,
    count: Float32[Array, "*s"],
    size: int,
    divide: Divide,
) -> tuple[Float32[Array, "*s"], Float32[Array, "*s"]]:
    """Stretches what codes stand for, so that what is read is not smaller than the values on average.

    The least squared error makes it smaller: its error is orthogonal to what is read, so that values x come back as
    x (1 - error / variance) on average, and such errors do not average out over tokens. With s' = var(x) / cov(x, c),
    about the same mean, what is read has a regression on x of slope 1.

    Args:
      scale: scales s under which values have their codes c.
      zero: zero points, likewise.
      found: sums of every group under them.
      count: how many entries of the group count.
      size: entries of a group.
      divide: the true quotient of two arrays of one shape.

    Returns:
      Scales and zero points to store beside the codes; the given ones where a group has one code only.
    """
    part, squared_part = parts_of(size)
    count = jnp.maximum(count, 1.0)
    full = lambda a: jnp.broadcast_to(jnp.float32(a), scale.shape)  # noqa: E731
    spread = found.cc - divide(found.c * found.c, count)
    along = divide(found.ce - divide(found.c * found.e, count), full(part))
    rest = divide(found.squared, full(squared_part)) - divide(found.e * found.e, count * part**2)
    covariance = jnp.where(spread + along > 0, spread + along, 1.0)  # of x and c, over s; the variance over s^2
    variance = jnp.where(spread + along > 0, jnp.clip(spread + 2 * along + rest, covariance / 2, 2 * covariance), 1.0)
    wide = divide(scale * variance, covariance)
    shift = divide(scale * found.e, count * part) - divide((wide - scale) * found.c, count)
    return wide, zero + jnp.where(spread + along > 0, shift, 0.0)
