"""Quantisation and packing in plain jnp: the reference that kernels must match bit for bit."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.layout import PLANES
from pallas_kernels.quantize_pack import least_squares


def quantize_pack(
    x: Float[Array, "N K R D"],
    counted: Bool[Array, "N R"],
    *,
    bits: int,
    per: str,
    group: int,
    fit: str = "minmax",
    interpret: bool = False,
):
    """See `pallas_kernels.quantize_pack`; `interpret` has no effect."""
    blocks, heads, tokens, channels = x.shape
    x = x.astype(jnp.float32)
    valid = jnp.broadcast_to(counted[:, None, :, None], x.shape)
    split = (blocks, heads, tokens, -1, group) if per == "token" else (blocks, heads, -1, group, channels)
    axis = -1 if per == "token" else -2
    grouped, valid = x.reshape(split), valid.reshape(split)
    unknown = jnp.isnan(jnp.where(valid, grouped, 0)).any(axis, keepdims=True)  # on CPU, minima in XLA skip NaN
    low = jnp.where(valid, grouped, jnp.inf).min(axis, keepdims=True)
    high = jnp.where(valid, grouped, -jnp.inf).max(axis, keepdims=True)
    empty = ~valid.any(axis, keepdims=True)
    low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)
    levels = 2**bits - 1
    scale, zero = _divide(high - low, jnp.float32(levels)).astype(jnp.float16), low.astype(jnp.float16)
    finite = jnp.isfinite(scale) & jnp.isfinite(zero) & ~unknown
    scale, zero = jnp.where(finite, scale, jnp.nan), jnp.where(finite, zero, jnp.nan)
    s, z = scale.astype(jnp.float32), zero.astype(jnp.float32)
    if fit == "mse":

        def sums(s: Array, z: Array) -> least_squares.Sums:
            each = least_squares.entries(grouped, valid, s, z, levels, group, _divide, jnp.round)
            return least_squares.Sums(*(a.sum(axis, keepdims=True) for a in each))

        count = valid.sum(axis, keepdims=True).astype(jnp.float32)
        s, z = least_squares.search(sums, s, z, count, levels, group, _divide, lambda s, z: (_narrow(s), _narrow(z)))
        scale, zero = s.astype(jnp.float16), z.astype(jnp.float16)
    codes = jnp.round(_divide(grouped - z, jnp.where(s == 0, 1.0, s)))
    codes = jnp.where(s == 0, 0.0, jnp.clip(codes, 0, levels)).astype(jnp.uint8).reshape(x.shape)
    scale, zero = scale.squeeze(axis), zero.squeeze(axis)
    if per == "token":
        scale, zero = scale.swapaxes(2, 3), zero.swapaxes(2, 3)
    planes, shift = [], 0
    for width in PLANES[bits]:
        rows = jnp.split((codes >> shift) & ((1 << width) - 1), 8 // width, axis=2)
        planes.append(functools.reduce(operator.or_, (row << (j * width) for j, row in enumerate(rows))))
        shift += width
    return tuple(planes), scale, zero


def _divide(x: Array, y: Array) -> Array:
    """The true quotient: XLA would turn division by a broadcast value into a product with its reciprocal."""
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def _narrow(x: Array) -> Array:
    return x.astype(jnp.float16).astype(jnp.float32)
