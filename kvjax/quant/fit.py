"""The search for the scale and the zero point that give a group the least squared error.

Candidates are the range that minimum and maximum span, narrowed about its middle, and then least-squares refits of
the best one to its own codes. Each is rounded to float16, as it is stored, before its error is taken. The range
itself comes first, and another candidate must have a smaller error.

A search that compares sums must not depend on their order, or a token would be stored differently in a chunk than
alone, and differently by a kernel. So errors are measured in steps of the candidate and rounded to integers before
they are summed, and no product is added to anything, because compilers fuse the two where they like.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16

NARROWED = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)  # parts of the range that are tried
REFITS = 3


def divide(x: Float[Array, "..."], y: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """The true quotient.

    XLA turns division by a broadcast value into a product with its reciprocal, which rounds twice; the barrier hides
    the broadcast from XLA.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(y, x.dtype), x.shape))


def least_squares(
    x: Float[Array, "..."],
    counted: Bool[Array, "..."] | None,
    levels: Float[Array, ""],
    axis: int,
    scale: Float16[Array, "..."],
    zero: Float16[Array, "..."],
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Searches the scales and zero points with the least squared error.

    Args:
      x: groups along `axis`.
      counted: which entries count; None where all do.
      levels: the largest code.
      axis: the axis of a group's entries, a negative number.
      scale: scales from minima and maxima, with 1 along `axis`; NaN where a group cannot be stored.
      zero: their zero points.

    Returns:
      Scales and zero points, likewise; the given ones where no candidate has a smaller error.
    """
    counted = jnp.ones(x.shape, bool) if counted is None else jnp.broadcast_to(counted, x.shape)
    count = jnp.maximum(counted.sum(axis, keepdims=True, dtype=jnp.int32), 1).astype(jnp.float32)
    widest, lowest = scale.astype(jnp.float32), zero.astype(jnp.float32)
    parts = jnp.array([(part, 1 - part) for part in NARROWED], jnp.float32)

    def step(i: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        part, rest = parts[jnp.minimum(i, len(NARROWED) - 1)]
        narrowed = widest * part, lowest + divide(widest * rest * levels, 2.0)
        pairs = zip(narrowed, best[3:], strict=True)
        s, z = (jnp.where(i < len(NARROWED), *pair).astype(jnp.float16) for pair in pairs)
        error, *refit = _measure(x, counted, count, levels, axis, s.astype(jnp.float32), z.astype(jnp.float32))
        better = (error < best[0]) & (s >= scale / 2) & jnp.isfinite(z)
        return tuple(jnp.where(better, a, b) for a, b in zip((error, s, z, *refit), best, strict=True))

    start = (jnp.full(scale.shape, jnp.inf, jnp.float32), scale, zero, widest, lowest)
    _, scale, zero, _, _ = jax.lax.fori_loop(0, len(NARROWED) + REFITS, step, start)
    return scale, zero


def _measure(
    x: Float[Array, "..."],
    counted: Bool[Array, "..."],
    count: Float[Array, "..."],
    levels: Float[Array, ""],
    axis: int,
    s: Float[Array, "..."],
    z: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """The squared error of groups under (s, z), and the (s, z) that fit the codes best.

    A distance in steps is cut at sqrt(n) for n entries of a group. From minimum and maximum no distance exceeds 1/2,
    so that a candidate of at least half their scale with such an entry loses anyway; and no sum overflows.
    """
    n = x.shape[axis]
    most = n**0.5
    fine, finest = _power_of_two(2**30 / (255 * n * most)), _power_of_two(2**30 / n**2)
    steps = divide(x - z, jnp.where(s > 0, s, 1.0))
    codes = jnp.clip(jnp.round(steps), 0, levels)
    off = jnp.where(counted, jnp.clip(steps - codes, -most, most), 0.0)
    codes = jnp.where(counted, codes, 0.0).astype(jnp.int32)
    whole = jnp.round(off * fine).astype(jnp.int32)

    def total(a: Array) -> Array:
        return a.sum(axis, keepdims=True, dtype=jnp.int32).astype(jnp.float32)

    error = s * s * total(jnp.round(off * off * finest).astype(jnp.int32))
    c, cc, e, ce = total(codes), total(codes * codes), total(whole), total(codes * whole)
    spread, along = cc - divide(c * c, count), ce - divide(c * e, count)
    spread = jnp.where(spread > 0, spread, jnp.inf)  # one code for all: nothing to refit
    refit_s = s + divide(s * along, spread * fine)
    return error, refit_s, z + divide(s * (e - divide(along * c, spread)), count * fine)


def _power_of_two(x: float) -> float:
    """The largest power of two up to x."""
    return 2.0 ** (math.frexp(x)[1] - 1)
