"""Asymmetric uniform quantisation in groups along one axis (KVTuner, section 3.2, equation 2; KIVI).

z = min and s = (max - min) / (2^b - 1) of each group, in float32, rounded to float16 first; then
code = clip(round((x - z) / s), 0, 2^b - 1), round half to even, and x̂ = s * code + z. s = 0 gives code 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float16, UInt8

from kvjax.errors import KvjaxError

BITS = (1, 2, 3, 4, 5, 6, 8)


@struct.dataclass
class Quantized:
    """Codes and, per group, scale and zero point. `axis` of scale and zero has one entry per group."""

    codes: UInt8[Array, "..."]
    scale: Float16[Array, "..."]
    zero: Float16[Array, "..."]


def _split(x: Array, axis: int, group: int) -> Array:
    """[..., n * group, ...] -> [..., n, group, ...] at a negative `axis`."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], -1, group, *x.shape[at + 1 :])


def _divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The true quotient. XLA turns division by a broadcast value into a product with its reciprocal, which rounds
    twice; the barrier hides the broadcast from it.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def quantize(
    x: Float[Array, "..."], bits: int, axis: int, group: int, mask: Bool[Array, "..."] | None = None
) -> Quantized:
    """Quantises groups of `group` neighbours along `axis` (negative).

    Args:
      x: values; cast to float32.
      mask: broadcastable to x; False entries enter no minimum or maximum and their codes mean nothing.

    Raises:
      KvjaxError: `bits` or `group` that cannot be, or, outside jit, a value that is not finite or whose group
        does not fit float16. Under jit such a group reads back as NaN, so that it cannot pass unseen.
    """
    if bits not in BITS:
        raise KvjaxError(f"{bits} bits: expected one of {', '.join(map(str, BITS))}")
    return quantize_to(x, jnp.float32(2**bits - 1), axis, group, mask)


def quantize_to(
    x: Float[Array, "..."],
    levels: Float[Array, ""],
    axis: int,
    group: int,
    mask: Bool[Array, "..."] | None = None,
) -> Quantized:
    """`quantize` to codes 0 to `levels`, 2^b - 1 <= 255, which may be traced: the width is data here."""
    if x.shape[axis] % group:
        raise KvjaxError(f"group {group} does not divide the axis of {x.shape[axis]}")
    grouped = _split(x.astype(jnp.float32), axis, group)
    low = high = grouped
    if mask is not None:
        valid = _split(jnp.broadcast_to(mask, x.shape), axis, group)
        low, high = jnp.where(valid, grouped, jnp.inf), jnp.where(valid, grouped, -jnp.inf)
    unknown = jnp.isnan(low).any(axis, keepdims=True)  # XLA's minima on CPU pass NaN over
    low, high = low.min(axis, keepdims=True), high.max(axis, keepdims=True)
    if mask is not None:
        empty = ~valid.any(axis, keepdims=True)
        low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)
    scale, zero = _divide(high - low, levels).astype(jnp.float16), low.astype(jnp.float16)
    finite = jnp.isfinite(scale) & jnp.isfinite(zero) & ~unknown
    if not isinstance(finite, jax.core.Tracer) and not bool(finite.all()):
        raise KvjaxError("cannot quantise values that are not finite or do not fit float16")
    scale, zero = jnp.where(finite, scale, jnp.nan), jnp.where(finite, zero, jnp.nan)
    s, z = scale.astype(jnp.float32), zero.astype(jnp.float32)
    codes = jnp.round(_divide(grouped - z, jnp.where(s == 0, 1.0, s)))
    codes = jnp.where(s == 0, 0.0, jnp.clip(codes, 0, levels)).astype(jnp.uint8)
    return Quantized(codes.reshape(x.shape), scale.squeeze(axis), zero.squeeze(axis))


def dequantize(q: Quantized, axis: int, group: int, dtype) -> Float[Array, "..."]:
    """scale * code + zero in `dtype`."""
    scale, zero = (jnp.expand_dims(a, axis).astype(dtype) for a in (q.scale, q.zero))
    return (_split(q.codes, axis, group).astype(dtype) * scale + zero).reshape(q.codes.shape)
