"""Quantisation and packing on TPU: a grid step reads some packing blocks of one head and writes their bytes.

Mosaic has no float16 and no shifts of bytes: scales are rounded to float16 bits by integer arithmetic, and codes are
packed as words of 32 bits, which hold one byte each until the end.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float16, Float32, Int32, UInt8

from pallas_kernels import mosaic_tpu_common as common
from pallas_kernels.layout import PLANES
from pallas_kernels.quantize_pack import least_squares

STEP_BYTES = 1 << 20  # bytes of the float32 values of a grid step
NAN = 0x7E00  # as float16
SMALLEST_NORMAL, OVERFLOW = 0x38800000, 0x477FF000  # as float32: 2**-14; 65520, which rounds to infinity


def quantize_pack(
    x: Float[Array, "N K R D"],
    counted: Bool[Array, "N R"],
    *,
    bits: int,
    per: str,
    group: int,
    fit: str = "minmax",
    interpret: bool = False,
) -> tuple[tuple[UInt8[Array, "N K _ D"], ...], Float16[Array, "N K _ _"], Float16[Array, "N K _ _"]]:
    """See `pallas_kernels.quantize_pack`."""
    blocks, heads, tokens, channels = x.shape
    together = max(1, min(blocks, STEP_BYTES // (4 * tokens * channels)))
    groups = (channels // group, tokens) if per == "token" else (tokens // group, channels)
    rows = [tokens * width // 8 for width in PLANES[bits]]

    def spec(height: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((together, None, height, columns), lambda i, k: (i, k, 0, 0))

    *planes, scale, zero = pl.pallas_call(
        functools.partial(_kernel, bits=bits, per=per, group=group, fit=fit),
        grid=(pl.cdiv(blocks, together), heads),
        in_specs=[spec(tokens, channels), pl.BlockSpec((together, 1, tokens), lambda i, k: (i, 0, 0))],
        out_specs=[*(spec(height, channels) for height in rows), spec(*groups), spec(*groups)],
        out_shape=[
            *(jax.ShapeDtypeStruct((blocks, heads, height, channels), jnp.uint8) for height in rows),
            *(jax.ShapeDtypeStruct((blocks, heads, *groups), jnp.int16) for _ in range(2)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="quantize_pack",
    )(x, counted.astype(jnp.float32)[:, None])
    scale, zero = (jax.lax.bitcast_convert_type(a, jnp.float16) for a in (scale, zero))
    return tuple(planes), scale, zero


def _kernel(x_ref, counted_ref, *out_refs, bits: int, per: str, group: int, fit: str) -> None:
    *plane_refs, scale_ref, zero_ref = out_refs

    def block(i, _):
        codes, scale, zero = _quantize(x_ref[i].astype(jnp.float32), counted_ref[i].T > 0, bits, per, group, fit)
        scale_ref[i], zero_ref[i] = (a.astype(jnp.int16) for a in (scale, zero))
        shift = 0
        for width, ref in zip(PLANES[bits], plane_refs, strict=True):
            ref[i] = _pack((codes >> shift) & ((1 << width) - 1), width).astype(jnp.uint8)
            shift += width

    jax.lax.fori_loop(0, x_ref.shape[0], block, None)


def _quantize(
    x: Float32[Array, "R D"], counted: Bool[Array, "R 1"], bits: int, per: str, group: int, fit: str
) -> tuple[Int32[Array, "_ _"], ...]:
    """Quantises a block: codes [R, D], and scales and zero points as float16 bits, in their stored order."""
    if per == "token":
        starts = range(0, x.shape[1], group)
        parts = [_group(x[:, at : at + group], counted, bits, 1, fit) for at in starts]
        codes, *rest = (jnp.concatenate([part[i] for part in parts], 1) for i in range(3))
        return codes, *(a.T for a in rest)
    starts = range(0, x.shape[0], group)
    parts = [_group(x[at : at + group], counted[at : at + group], bits, 0, fit) for at in starts]
    return tuple(jnp.concatenate([part[i] for part in parts]) for i in range(3))


def _group(
    x: Float32[Array, "R D"], counted: Bool[Array, "R 1"], bits: int, axis: int, fit: str
) -> tuple[Int32[Array, "R D"], Int32[Array, "_ _"], Int32[Array, "_ _"]]:
    """`_quantize` for one row of groups along `axis`."""
    low = jnp.where(counted, x, jnp.inf).min(axis, keepdims=True)
    high = jnp.where(counted, x, -jnp.inf).max(axis, keepdims=True)
    finite = jnp.where(counted, x - x, 0.0).sum(axis, keepdims=True) == 0.0  # minima may skip NaN
    empty = low > high
    low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)
    levels = 2**bits - 1
    # Divisors that depend on the dividend: XLA turns division by a broadcast value into a product.
    scale = narrow((high - low) / jnp.where(high < low, 1.0, levels))
    zero = narrow(low)
    fits = finite & (scale != NAN) & (zero != NAN)
    scale, zero = jnp.where(fits, scale, NAN), jnp.where(fits, zero, NAN)
    s, z = common.widen(scale), common.widen(zero)
    if fit == "mse":
        s, z = _fit(x, counted, levels, axis, s, z)
        scale, zero = narrow(s), narrow(z)
    used = (x == x) & (s > 0.0)
    codes = jnp.clip(jnp.round((x - z) / jnp.where(used, s, 1.0)), 0, levels)
    return jnp.where(used, codes, 0.0).astype(jnp.int32), scale, zero


def _fit(
    x: Float32[Array, "R D"],
    counted: Bool[Array, "R 1"],
    levels: int,
    axis: int,
    s: Float32[Array, "_ _"],
    z: Float32[Array, "_ _"],
) -> tuple[Float32[Array, "_ _"], Float32[Array, "_ _"]]:
    """Scales and zero points of `_group` with the least squared error."""
    valid = jnp.broadcast_to(counted, x.shape)

    def sums(s: Array, z: Array) -> least_squares.Sums:
        each = least_squares.entries(x, valid, s, z, levels, x.shape[axis], _divide, jnp.round)
        return least_squares.Sums(*(a.sum(axis, keepdims=True) for a in each))

    count = jnp.where(valid, 1.0, 0.0).sum(axis, keepdims=True)
    stored = lambda s, z: (common.widen(narrow(s)), common.widen(narrow(z)))  # noqa: E731
    return least_squares.search(sums, s, z, count, levels, x.shape[axis], _divide, stored)


def _divide(x: Array, y: Array) -> Array:
    """The true quotient; the divisor depends on the dividend, or XLA would make it a product in the interpreter."""
    return x / jnp.where(x == jnp.inf, 1.0, y)


def narrow(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Rounds to the nearest float16, half to even, and returns its bits; NAN where it is not finite."""
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    size = word & 0x7FFFFFFF
    normal = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10)
    subnormal = jnp.round(jnp.abs(x) * 2.0**24).astype(jnp.int32)
    bits = jnp.where(size < SMALLEST_NORMAL, subnormal, normal)
    return jnp.where(size >= OVERFLOW, NAN, jnp.where(word < 0, bits | -0x8000, bits))


def _pack(codes: Int32[Array, "R D"], width: int) -> Int32[Array, "_ D"]:
    """Packs the codes of a plane into bytes, one byte per word."""
    rows = codes.shape[0] * width // 8
    pieces = (codes[i * rows : (i + 1) * rows] << (i * width) for i in range(8 // width))
    return functools.reduce(operator.or_, pieces)
