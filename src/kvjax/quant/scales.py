"""Scales and zero points as they are stored: in float16 each, or in 8 bits each.

Both numbers of 8 bits are floats with 3 bits of mantissa, wrong by 1/16 at most. One is the scale s, a float16 that
needs no sign. The other gives the zero point z by the middle of the range, m = z + s (2^b - 1) / 2, as a part of the
range s 2^b: most middles lie near 0, where it is finest (1/512). Codes are taken after all this and make up for most
of it (docs/decisions.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8, UInt16

DROPPED = 7  # bits of a float16's mantissa of 10 that are left out
UNIT = 2.0**-8  # m / (s 2^b), at most 8, in a float16 that needs only the lower half of its exponents

Scales = tuple[Array, Array]


def divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The true quotient.

    XLA turns division by a broadcast value into a product with its reciprocal, which rounds twice; the barrier hides
    the broadcast from XLA.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def storable(
    scale: Float[Array, "..."], zero: Float[Array, "..."], levels: Float[Array, ""], bits: int, covers: bool = False
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What is stored for a scale and a zero point.

    Args:
      scale: scales, in float32.
      zero: zero points, likewise.
      levels: the largest code, 2^b - 1.
      bits: of each of the two, 16 or 8.
      covers: with 8 bits, makes scales so large that no value of the given range is further than half a step from a
        code. Else they are the nearest.

    Returns:
      Scales and zero points in float32, numbers that float16 holds; not finite where it does not hold them. Given
      these and not `covers`, it returns the same.
    """
    if bits == 8:
        middle = _middle(scale, zero, levels)
        kept = _short(scale)
        if covers:
            needed = divide(scale * levels, levels + 1) + divide(jnp.abs(middle), 8 * (levels + 1))
            kept = jnp.maximum(kept, _short(needed, up=True))
        scale, zero = from_bytes(*_to_bytes(_long(kept).astype(jnp.float32), middle, levels), levels)
    narrow = lambda a: a.astype(jnp.float16).astype(jnp.float32)  # noqa: E731
    return narrow(scale), narrow(zero)


def to_bytes(
    scale: Float16[Array, "..."], zero: Float16[Array, "..."], levels: Float[Array, ""]
) -> tuple[UInt8[Array, "..."], UInt8[Array, "..."]]:
    """Bytes of scales and zero points that `storable` gave; `levels` is the largest code."""
    s, z = scale.astype(jnp.float32), zero.astype(jnp.float32)
    return _to_bytes(s, _middle(s, z, levels), levels)


def from_bytes(
    scale: UInt8[Array, "..."], zero: UInt8[Array, "..."], levels: Float[Array, ""]
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Scales and zero points whose bytes `to_bytes` gave."""
    wide, sign = zero.astype(jnp.uint16), jnp.uint16(0x80)
    part = _long((wide & ~sign) | ((wide & sign) << 1)).astype(jnp.float32)
    s = _long(scale.astype(jnp.uint16))
    # Numbers of few bits: each step but the last is exact, however compilers fuse them.
    steps = part * ((levels + 1) / UNIT) - levels / 2
    return s, (s.astype(jnp.float32) * steps).astype(jnp.float16)


def _middle(scale: Array, zero: Array, levels: Array) -> Array:
    return zero + divide(scale * levels, jnp.float32(2))  # compilers may fuse a product with a sum, not a quotient


def _to_bytes(scale: Array, middle: Array, levels: Array) -> Scales:
    part = divide(middle, jnp.where(scale > 0, scale, 1.0)) * (UNIT / (levels + 1))
    kept = _short(part)
    return _short(scale).astype(jnp.uint8), ((kept & 0x7F) | ((kept >> 1) & 0x80)).astype(jnp.uint8)


def _short(x: Float[Array, "..."], up: bool = False) -> UInt16[Array, "..."]:
    """The upper bits of a float16 with zeros below them: the nearest to x, or the next that is not nearer to 0."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)
    return (bits + jnp.uint16(2**DROPPED - 1 if up else 2 ** (DROPPED - 1))) >> DROPPED


def _long(bits: UInt16[Array, "..."]) -> Float16[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits << DROPPED, jnp.float16)
