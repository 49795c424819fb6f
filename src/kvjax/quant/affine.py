"""Asymmetric uniform quantisation in groups along one axis (KVTuner, section 3.2, equation 2; KIVI).

z = min and s = (max - min) / (2^b - 1) of each group, in float32, rounded to float16 first; then
code = clip(round((x - z) / s), 0, 2^b - 1), round half to even, and x̂ = s * code + z. s = 0 gives code 0.

With another `fit`, s and z are chosen otherwise (kvjax/quant/fit.py): what is stored and how it is read stay
the same. With `scale_bits` of 8 they are rounded further (kvjax/quant/scales.py), to numbers that take 8 bits each.

float16 bounds what can be told apart: s below 3e-8 becomes 0 and z is a multiple of 6e-8, so groups that are smaller
read back as their minimum. Models of such sizes are kept in other units, see `kvjax.models.units`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float16, UInt8

from kvjax.errors import KvjaxError
from kvjax.quant.fit import least_squares, normal, unbiased, whole_steps, with_length
from kvjax.quant.scales import divide, storable

BITS = (1, 2, 3, 4, 5, 6, 8)
Fit = Literal["minmax", "mse", "unbiased", "normal", "integer"]  # how scale and zero point of a group are chosen


@struct.dataclass
class Quantized:
    """Codes with a scale and a zero point per group.

    Along the quantised axis, `scale` and `zero` have one entry per group.
    """

    codes: UInt8[Array, "..."]
    scale: Float16[Array, "..."]
    zero: Float16[Array, "..."]


def _split(x: Array, axis: int, group: int) -> Array:
    """[..., n * group, ...] -> [..., n, group, ...] at a negative `axis`."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], -1, group, *x.shape[at + 1 :])


def quantize(
    x: Float[Array, "..."],
    bits: int,
    axis: int,
    group: int,
    mask: Bool[Array, "..."] | None = None,
    fit: Fit = "minmax",
    scale_bits: int = 16,
) -> Quantized:
    """Quantises groups of neighbours along one axis.

    Args:
      x: values; cast to float32.
      bits: code width, one of `BITS`.
      axis: the axis of the groups, a negative number.
      group: neighbours that share a scale and a zero point; divides the axis.
      mask: broadcastable to x. Entries where it is False do not count towards minima and maxima, and their codes mean
        nothing.
      fit: "minmax"; "mse" for the least squared error that `least_squares` finds; "unbiased" for the same codes with
        the scales of `unbiased`; "normal" for the levels of `normal`, scaled by `with_length`; "integer" for zero
        points that are whole numbers of scales, min(x) / s rounded, as in KVTuner's public code.
      scale_bits: 16, or 8 for scales and zero points that take 8 bits each.

    Returns:
      Codes of the shape of x, with scales and zero points.

    Raises:
      KvjaxError: `bits` or `group` that is not possible; outside jit also a value that is not finite, or a group that
        does not fit float16. Under jit such a group reads back as NaN, so that the fault is visible.
    """
    if bits not in BITS:
        raise KvjaxError(f"{bits} bits: expected one of {', '.join(map(str, BITS))}")
    return quantize_to(x, jnp.float32(2**bits - 1), axis, group, mask, fit, scale_bits)


def quantize_to(
    x: Float[Array, "..."],
    levels: Float[Array, ""],
    axis: int,
    group: int,
    mask: Bool[Array, "..."] | None = None,
    fit: Fit = "minmax",
    scale_bits: int = 16,
) -> Quantized:
    """`quantize` with the largest code in place of the width: one compiled program serves every width.

    Args:
      x: values; cast to float32.
      levels: the largest code, 2^b - 1 <= 255; may be traced.
      axis: the axis of the groups, a negative number.
      group: neighbours that share a scale and a zero point; divides the axis.
      mask: as in `quantize`.
      fit: as in `quantize`.
      scale_bits: as in `quantize`.

    Returns:
      Codes of the shape of x, with scales and zero points.

    Raises:
      KvjaxError: as `quantize` for `group` and values.
    """
    if x.shape[axis] % group:
        raise KvjaxError(f"group {group} does not divide the axis of {x.shape[axis]}")
    grouped = _split(x.astype(jnp.float32), axis, group)
    counted = None if mask is None else _split(jnp.broadcast_to(mask, x.shape), axis, group)
    scale, zero = _from_range(grouped, counted, levels, axis, scale_bits)
    if fit == "integer":
        scale, zero = whole_steps(scale, zero, levels, scale_bits)
    elif fit == "normal":
        wide = _split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis, group)
        scale, zero = normal(wide, counted, levels, axis, scale_bits)
    elif fit != "minmax":
        scale, zero = least_squares(grouped, counted, levels, axis, scale, zero, scale_bits)
    s, z = scale.astype(jnp.float32), zero.astype(jnp.float32)
    codes = jnp.round(divide(grouped - z, jnp.where(s == 0, 1.0, s)))
    codes = jnp.where(s == 0, 0.0, jnp.clip(codes, 0, levels)).astype(jnp.uint8)
    if fit == "unbiased":
        scale, zero = unbiased(grouped, counted, levels, axis, scale, zero, scale_bits)
    elif fit == "normal":
        scale, zero = with_length(wide, counted, levels, axis, codes, scale_bits)
    return Quantized(codes.reshape(x.shape), scale.squeeze(axis), zero.squeeze(axis))


def _from_range(
    x: Float[Array, "..."], counted: Bool[Array, "..."] | None, levels: Float[Array, ""], axis: int, scale_bits: int
) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Scale and zero point of groups along `axis`, from their minimum and maximum; NaN where they do not fit."""
    low = high = x
    if counted is not None:
        low, high = jnp.where(counted, x, jnp.inf), jnp.where(counted, x, -jnp.inf)
    unknown = jnp.isnan(low).any(axis, keepdims=True)  # on CPU, minima in XLA skip NaN
    low, high = low.min(axis, keepdims=True), high.max(axis, keepdims=True)
    if counted is not None:
        empty = ~counted.any(axis, keepdims=True)
        low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)
    stored = storable(divide(high - low, levels), low, levels, scale_bits, covers=True)
    scale, zero = (a.astype(jnp.float16) for a in stored)
    finite = jnp.isfinite(scale) & jnp.isfinite(zero) & ~unknown
    if not isinstance(finite, jax.core.Tracer) and not bool(finite.all()):
        raise KvjaxError("cannot quantise values that are not finite or do not fit float16")
    return jnp.where(finite, scale, jnp.nan), jnp.where(finite, zero, jnp.nan)


def dequantize(q: Quantized, axis: int, group: int, dtype) -> Float[Array, "..."]:
    """Computes scale * code + zero.

    Args:
      q: what `quantize` returned.
      axis: the axis that it was given.
      group: the group that it was given.
      dtype: dtype of the computation and of the values.

    Returns:
      The values, in the shape of the codes.
    """
    scale, zero = (jnp.expand_dims(a, axis).astype(dtype) for a in (q.scale, q.zero))
    return (_split(q.codes, axis, group).astype(dtype) * scale + zero).reshape(q.codes.shape)
