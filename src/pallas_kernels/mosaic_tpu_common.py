"""Code that the TPU kernels share: packed tensors in VMEM, unpacking of codes, scales and an online softmax.

Mosaic has no float16 vectors and no shifts of bytes: scales travel as int16 bits and widen to float32 by integer
arithmetic, and bytes are shifted four at a time, as words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int, Int16, Int32, UInt8

from pallas_kernels.layout import EXACT, MASKED, PLANES, Packed

LANES = 128
BYTE_TILE = 32  # rows of a tile of bytes
BLOCK_BYTES = 2 << 20  # of all inputs of a grid step; the pipeline holds those of two steps
BLOCK_TOKENS = 4096
PIECE = 512  # channels dequantised at a time, where there are many


class PackedRefs(NamedTuple):
    """The arrays of a packed tensor, their block specs or their refs; scale and zero are None where exact."""

    planes: tuple[Any, ...]
    scale: Any
    zero: Any


def stream(packed: Packed) -> PackedRefs:
    """Converts a packed tensor to the arrays that kernels take.

    Scales become int16 bits, of shape [B, K, S] where a token has one group. XLA lays [B, K, 1, S] out with heads
    along sublanes, which is the layout of [B, K, S]; given as [B, K, 1, S] it would be copied. Libtpu takes no
    float16 argument, and XLA copies an array when it casts it to bits; arrays that are int16 already are not copied.

    Args:
      packed: the tensor.
    """
    if packed.bits == EXACT:
        return PackedRefs(packed.planes, None, None)
    both: tuple[Any, Any] = (packed.scale, packed.zero)
    arrays = (a.squeeze(2) if _single(packed) else a for a in both)
    bits = (a if a.dtype == jnp.int16 else jax.lax.bitcast_convert_type(a, jnp.int16) for a in arrays)
    return PackedRefs(packed.planes, *bits)


def _single(packed: Packed) -> bool:
    """Whether a token has one scale."""
    return packed.bits != EXACT and packed.per == "token" and packed.group == packed.shape[3]


def heads_of(*tensors: Packed) -> int:
    """Returns the number of heads per grid step; a tile of scales may hold the scales of eight heads."""
    heads = tensors[0].shape[1]
    if heads % 8 and any(map(_single, tensors)):
        return heads
    return next(n for n in range(min(8, heads), 0, -1) if heads % n == 0)


def stream_specs(packed: Packed, heads: int, block: int, index: Callable[..., tuple[Any, Any, Any]]) -> PackedRefs:
    """Returns the block specs of a packed tensor.

    Args:
      packed: the tensor.
      heads: heads of a block.
      block: tokens of a block.
      index: maps a grid step to block indices of sequence, heads and tokens.
    """
    channels = packed.shape[3]

    def rows(count: int, columns: int = channels) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, count, columns), lambda *step: (*index(*step), 0))

    if packed.bits == EXACT:
        return PackedRefs((rows(block),), None, None)
    planes = tuple(rows(block * width // 8) for width in PLANES[packed.bits])
    if packed.per == "channel":
        scale = rows(block // packed.group)
    elif _single(packed):
        scale = pl.BlockSpec((None, heads, block), lambda *step: index(*step))
    else:
        shape = (None, heads, channels // packed.group, block)
        scale = pl.BlockSpec(shape, lambda *step: (*index(*step)[:2], 0, index(*step)[2]))
    return PackedRefs(planes, scale, scale)


def scale_scratch(packed: Packed, heads: int, block: int) -> Any:
    """Returns the scratch buffers for float32 scales and zero points of a block."""
    if packed.bits == EXACT:
        return ()
    channels, group = packed.shape[3], packed.group
    shape: tuple[int, ...]
    if packed.per == "channel":
        shape = (heads, block // group, channels)
    else:
        shape = (heads, block) if _single(packed) else (heads, channels // group, block)
    return (pltpu.VMEM(shape, jnp.float32), pltpu.VMEM(shape, jnp.float32))


def widen_scales(packed: Packed, refs: PackedRefs, scratch: Any) -> None:
    """Fills the buffers of `scale_scratch`; zero points are adapted to the centred codes that `read` returns."""
    if packed.bits != EXACT:
        scale, zero = widen(refs.scale[...]), widen(refs.zero[...])
        scratch[0][...], scratch[1][...] = scale, zero + scale * float(middle(packed.bits))


def of_head(packed: Packed, head: Any, refs: PackedRefs, scratch: Any) -> tuple[tuple[Any, ...], Any]:
    """Returns planes [rows, D] and float32 scales [G, block] or [block/group, D] of one head of a block."""
    at = pl.ds(head, 1) if _single(packed) else head
    return tuple(ref.at[head] for ref in refs.planes), tuple(ref.at[at] for ref in scratch)


def middle(bits: int) -> int:
    """Returns what `read` subtracts from codes: sums of centred codes have smaller rounding errors."""
    return 0 if bits == 1 else 1 << (bits - 1)


def widen(bits: Int16[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Converts bits of float16 to float32; values that are not finite become NaN.

    Subnormals are converted from their integer, because a product would flush them to zero.

    Args:
      bits: the bits.
    """
    word = bits.astype(jnp.int32)
    size = word & 0x7FFF
    normal = jax.lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    value = jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)
    value = jnp.where(size >= 0x7C00, jnp.nan, value)
    return jnp.where(word < 0, -value, value)


def read(packed: Packed, planes: tuple[Any, ...], at: Int32[Array, ""], count: int, dtype) -> Float[Array, "count D"]:
    """Reads centred codes, or exact values, from a block.

    Args:
      packed: the tensor.
      planes: refs of the planes of one head.
      at: the first token within the block.
      count: number of tokens.
      dtype: dtype of the result.
    """
    if packed.bits == EXACT:
        return planes[0][pl.ds(at, count), :].astype(dtype)
    codes: Any = None
    low = 0
    for width, ref in zip(PLANES[packed.bits], planes, strict=True):
        rows = ref[pl.ds(pl.multiple_of(quotient(at * width, 8), BYTE_TILE), count * width // 8), :]
        part = unpack(rows, width, packed.pack, 0 if low else middle(packed.bits))
        codes, low = part if codes is None else codes + (part << low), low + width
    return codes.astype(jnp.float32).astype(dtype)


def unpack(rows: UInt8[Array, "R D"], width: int, pack: int, less: int) -> Int32[Array, "N D"]:
    """Unpacks the codes of one plane, tokens in order.

    Args:
      rows: byte rows of whole packing blocks.
      width: bits of a code in the plane.
      pack: tokens of a packing block.
      less: subtracted from every code.
    """
    channels, height = rows.shape[1], pack * width // 8
    if height < 8:
        return _unpack_low(rows.astype(jnp.int32), width) - less
    # Four bytes at a time. No byte overflows: 128 - less is added first, then the top bit flipped.
    words, mask, bias = pltpu.bitcast(rows, jnp.int32), _bytes((1 << width) - 1), _bytes(0x80 - less)
    pieces = []
    for shift in range(0, 8, width):
        codes = words if width == 8 else (words >> shift) & mask
        if less:
            codes = (codes if width == 8 else codes + bias) ^ _bytes(0x80)
        pieces.append(pltpu.bitcast(codes, jnp.int8).astype(jnp.int32).reshape(-1, height, channels))
    return jnp.concatenate(pieces, 1).reshape(-1, channels)


def _bytes(value: int) -> int:
    """Returns a word of four equal bytes, as a signed integer."""
    return int.from_bytes(bytes([value] * 4), "little", signed=True)


def _unpack_low(rows: Int32[Array, "R D"], width: int) -> Int32[Array, "N D"]:
    """`unpack` where a packing block has 4 rows, half a tile: rows are doubled, and each half has another shift."""
    tiles = rows.reshape(-1, 8, rows.shape[1])
    upper = jax.lax.broadcasted_iota(jnp.int32, tiles.shape, 1) >= 4
    turned = pltpu.roll(tiles, 4, 1)
    doubled = jnp.stack([jnp.where(upper, turned, tiles), jnp.where(upper, tiles, turned)], 1)
    doubled = doubled.reshape(-1, 1, 8, rows.shape[1])
    own = jnp.where(jax.lax.broadcasted_iota(jnp.int32, doubled.shape, 2) >= 4, width, 0)
    pieces = [(doubled >> (own + shift)) & ((1 << width) - 1) for shift in range(0, 8, 2 * width)]
    return jnp.concatenate(pieces, 1).reshape(-1, rows.shape[1])


def chunk_of(*tensors: Packed, least: int) -> int:
    """Returns the tokens to compute at a time: whole packing blocks and whole tiles of every plane.

    Args:
      *tensors: the packed tensors that are read side by side.
      least: the smallest number allowed.

    Raises:
      NotImplementedError: the tensors' settings have no such number, or none that fits.
    """
    step = 8 * BYTE_TILE
    for packed in tensors:
        if packed.bits == EXACT:
            continue
        heights = [packed.pack * width // 8 for width in PLANES[packed.bits] if width < 8]
        if any(height % 8 and height != 4 for height in heights):
            raise NotImplementedError(f"{packed.bits} bits in packing blocks of {packed.pack} tokens")
        if packed.per == "channel" and LANES % packed.group and packed.group % LANES:
            raise NotImplementedError(f"groups of {packed.group} tokens; expected divisors or multiples of {LANES}")
        step = math.lcm(step, packed.pack)
    if step > BLOCK_TOKENS:
        raise NotImplementedError(f"packing blocks that fit one another only every {step} tokens")
    return step * -(-least // step)


def block_of(*tensors: Packed, heads: int, chunk: int, block: int | None) -> int:
    """Returns the tokens of a grid step: a multiple of `chunk` and, for tiles of scales, of 8 groups of tokens.

    Args:
      *tensors: the packed tensors that are read side by side.
      heads: heads of a grid step.
      chunk: tokens computed at a time.
      block: the number wanted; None for one that fits VMEM.

    Raises:
      NotImplementedError: groups of tokens are too large for a block.
    """
    groups = [8 * packed.group for packed in tensors if packed.bits != EXACT and packed.per == "channel"]
    step = math.lcm(chunk, *groups)
    if step > BLOCK_TOKENS:
        raise NotImplementedError(f"groups of tokens that fit one another only every {step} tokens")
    batch, all_heads, tokens, _ = tensors[0].shape
    if block is None:
        nbytes = sum(plane.size * plane.dtype.itemsize for packed in tensors for plane in packed.planes)
        block = min(BLOCK_TOKENS, BLOCK_BYTES * batch * all_heads * tokens // (heads * nbytes))
    return min(max(step, block // step * step), -(-tokens // step) * step)


def bounds_of(
    start: Int[Array, "B"], stop: Int[Array, "B"], queries: int, first: int, window: int | None
) -> Int32[Array, "4 B"]:
    """Returns four rows per sequence: start, stop, and the range of positions that any query sees.

    Args:
      start: position of the first query.
      stop: the position after the last that is read.
      queries: queries of a sequence.
      first: the first position that is read.
      window: sliding window in tokens; None where there is none.
    """
    start, stop = start.astype(jnp.int32), stop.astype(jnp.int32)
    low = jnp.full_like(start, first) if window is None else jnp.maximum(first, start + 1 - window)
    return jnp.stack([start, stop, low, jnp.maximum(jnp.minimum(stop, start + queries), low)])


def steps_of(tokens: int, queries: int, first: int, window: int | None, block: int) -> int:
    """Returns the number of grid steps that cover the positions seen, for any alignment of the blocks."""
    steps = -(-tokens // block) - first // block
    return max(1, steps if window is None else min(steps, (window + queries + block - 3) // block + 1))


def block_at(bounds, batch, step, tokens: int, block: int):
    """Returns the block of a grid step. Steps past the last block that is seen stay on it, and so fetch nothing."""
    low, high = bounds[2, batch], bounds[3, batch]
    last = jnp.minimum(quotient(jnp.maximum(high - 1, 0), block), (tokens - 1) // block)
    return jnp.minimum(quotient(low, block) + step, last)


def quotient(x, y: int):
    """x // y for x >= 0: without a device at hand, Mosaic cannot lower `//`, which looks at the sign."""
    return jax.lax.div(x, jnp.int32(y))


def dot(x: Float[Array, "M N"], y: Float[Array, "N D"], *, transposed: bool = False) -> Float32[Array, "M D"]:
    """Computes x @ y, or x @ y.T where `transposed`, in the precision of the operands, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def weighed(p: Float32[Array, "M N"], x: Float[Array, "N D"], several: bool) -> Float32[Array, "M D"]:
    """Computes p @ x, where a value adds nothing to a row that gives it no weight, even if it is NaN.

    Args:
      p: weights.
      x: values; those that no row weighs are finite.
      several: whether rows weigh different values.
    """
    if not several:
        return dot(p.astype(x.dtype), x)
    wide = x.astype(jnp.float32)
    finite = jnp.abs(wide) < jnp.inf  # false for NaN
    lost = dot(jnp.where(p != 0.0, 1.0, 0.0), jnp.where(finite, 0.0, 1.0))
    return jnp.where(lost > 0.0, jnp.nan, dot(p.astype(x.dtype), jnp.where(finite, wide, 0.0).astype(x.dtype)))


def reset(top_ref, sum_ref, acc_ref) -> None:
    """Sets the running maximum, sum and weighted values of a softmax to those over no keys."""
    top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)


def finish(top_ref, sum_ref, acc_ref) -> tuple[Float32[Array, "M D"], Float32[Array, "M 1"]]:
    """Returns the output and the log-sum-exp; 0 and MASKED for a query that saw no key."""
    total = sum_ref[...]
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    return acc_ref[...] / safe, jnp.where(empty, MASKED, top_ref[...] + jnp.log(safe))


def edges_of(
    rows: int, ratio: int, bounds, sequence, first: int, window: int | None
) -> tuple[Int32[Array, "M 1"], Int32[Array, "M 1"]]:
    """Returns the range of positions that each query row sees; a query has `ratio` rows."""
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0).astype(jnp.float32)
    at = bounds[0, sequence] + ((row + 0.5) * (1.0 / ratio)).astype(jnp.int32)  # no vector division on TPU
    low = jnp.full_like(at, first) if window is None else jnp.maximum(first, at + 1 - window)
    return low, jnp.minimum(at + 1, bounds[1, sequence])


def seen(edges: tuple[Int32[Array, "M 1"], Int32[Array, "M 1"]], base, count: int) -> Bool[Array, "M N"]:
    """Says which of `count` positions from `base` on each query row sees."""
    position = base + jax.lax.broadcasted_iota(jnp.int32, (edges[0].shape[0], count), 1)
    return (position >= edges[0]) & (position < edges[1])


def chunks_of(base, low, high, block: int, chunk: int) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Returns the range of chunks, in the block at `base`, that hold positions in [low, high)."""
    return quotient(jnp.maximum(low - base, 0), chunk), quotient(jnp.minimum(high - base, block) + chunk - 1, chunk)


def soften(
    scores: Float32[Array, "M N"], seen: Bool[Array, "M N"], top: Float32[Array, "M 1"]
) -> tuple[Float32[Array, "M 1"], Float32[Array, "M N"], Float32[Array, "M 1"]]:
    """Takes one step of an online softmax.

    Args:
      scores: scores of N keys.
      seen: which of them each row sees.
      top: the running maximum.

    Returns:
      The new maximum, the exponentials relative to it, and the factor by which earlier sums shrink.
    """
    new = jnp.maximum(top, scores.max(1, keepdims=True))
    return new, jnp.where(seen, jnp.exp(scores - new), 0.0), jnp.exp(top - new)


def dequantized(
    packed: Packed, planes: tuple[Any, ...], scales, at: Int32[Array, ""], count: int, columns: tuple[int, int]
) -> Float32[Array, "count C"]:
    """Dequantises part of a block.

    Args:
      packed: the tensor.
      planes: refs of the planes of one head.
      scales: refs of its scales and zero points in float32.
      at: the first token within the block.
      count: number of tokens.
      columns: the first channel, and the one after the last.
    """
    first, last = columns
    values = read(packed, tuple(plane.at[:, first:last] for plane in planes), at, count, jnp.float32)
    if packed.bits == EXACT:
        return values
    if packed.per == "channel":
        size = min(packed.group, count)
        rows = pl.ds(quotient(at, packed.group), count // size)
        scale, zero = (ref[rows, first:last][:, None] for ref in scales)
        return (values.reshape(-1, size, last - first) * scale + zero).reshape(count, last - first)
    scale, zero = (_spread(ref[:, pl.ds(at, count)], packed.group, columns) for ref in scales)
    return values * scale + zero


def _spread(scale: Float32[Array, "G N"], group: int, columns: tuple[int, int]) -> Float32[Array, "N C"]:
    """Repeats scales of groups of channels for every channel, and transposes them.

    It multiplies by a matrix of ones and zeros. Each scale is split into a sum of three bfloat16 numbers, so that the
    result is exact.
    """
    parts, rest = [], scale
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16).astype(jnp.float32))
        rest = rest - parts[-1]
    shape = (scale.shape[0], columns[1] - columns[0])
    start = group * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    channel = columns[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    own = jnp.where((channel >= start) & (channel < start + group), 1.0, 0.0)
    x, y = (jnp.concatenate(a).astype(jnp.bfloat16) for a in (parts, [own] * 3))
    return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def pieces_of(packed: Packed) -> list[tuple[int, int]]:
    """Splits the channels into ranges that are dequantised one at a time."""
    width = packed.shape[3]
    step = width if width <= 2 * PIECE else PIECE
    return [(first, min(first + step, width)) for first in range(0, width, step)]
