"""A packed history of one tensor (keys or values): written by token or by block, read by block.

The layout is private to this file and quant/packing. All arrays are [B, K, tokens or less, channels or less]:
codes are planar along tokens where blocks are written (unpacking is a shift and a mask of whole rows) and along
channels where single tokens are. B batch, K kv heads, S allocated tokens, D head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.errors import KvjaxError
from kvjax.quant import affine, packing

EXACT = 16  # the width that means unquantised


@dataclasses.dataclass(frozen=True)
class Format:
    """How one tensor is stored.

    bits: code width, or 16 for the values themselves in the cache's dtype.
    per: "token" (groups of `group` channels of a token) or "channel" (groups of `group` tokens of a channel).
    block: tokens written at a time, 0 for one by one.
    """

    bits: int
    per: str
    group: int
    block: int

    def __post_init__(self) -> None:
        if self.per == "channel" and (self.block == 0 or self.block % self.group):
            raise KvjaxError(f"residual {self.block} is not a positive multiple of the token group {self.group}")

    @property
    def group_axis(self) -> int:
        return -1 if self.per == "token" else -2

    @property
    def pack_axis(self) -> int:
        return -2 if self.block and self.block % 8 == 0 else -1

    @property
    def bits_asymptotic(self) -> float:
        """Bits per element, scale and zero point (float16 each) included."""
        return self.bits if self.bits == EXACT else self.bits + 32 / self.group


@struct.dataclass
class Packed:
    """The history: byte planes (or the exact values), scales and zero points."""

    planes: tuple[Array, ...]
    scale: Array | None
    zero: Array | None
    format: Format = struct.field(pytree_node=False)

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        if self.format.bits == EXACT:
            return self.planes[0].shape[2]
        rows, width = self.planes[0].shape[2], packing.PLANES[self.format.bits][0]
        return rows * 8 // width if self.format.pack_axis == -2 else rows


def init(format: Format, batch: int, kv_heads: int, tokens: int, head_dim: int, dtype) -> Packed:
    """An empty history of at least `tokens` tokens, rounded up to whole blocks."""
    if head_dim % 8:
        raise KvjaxError(f"head_dim {head_dim} is not a multiple of 8")
    tokens = -(-tokens // max(format.block, 1)) * max(format.block, 1)
    full = (batch, kv_heads, tokens, head_dim)
    if format.bits == EXACT:
        return Packed((jnp.zeros(full, dtype),), None, None, format)
    planes = tuple(
        jnp.zeros(_scaled(full, format.pack_axis, width, 8), jnp.uint8) for width in packing.PLANES[format.bits]
    )
    groups = _scaled(full, format.group_axis, 1, format.group)
    return Packed(planes, jnp.zeros(groups, jnp.float16), jnp.zeros(groups, jnp.float16), format)


def _scaled(shape: tuple[int, ...], axis: int, numerator: int, denominator: int) -> tuple[int, ...]:
    out = list(shape)
    out[axis] = out[axis] * numerator // denominator
    return tuple(out)


def logical_axes(packed: Packed) -> Packed:
    """The same tree with a PartitionSpec of logical names at every leaf."""
    return jax.tree.map(lambda _: PartitionSpec("batch", "kv_heads", None, None), packed)


def write_tokens(packed: Packed, x: Float[Array, "B T K D"], positions: Int[Array, "B T"]) -> Packed:
    """Stores tokens one by one; positions at or beyond S are dropped."""
    if packed.format.bits == EXACT:
        return packed.replace(planes=(_put(packed.planes[0], x, positions),))
    format = packed.format
    q = affine.quantize(x, format.bits, -1, format.group)
    planes = packing.pack(q.codes, format.bits, -1)
    return packed.replace(
        planes=tuple(_put(old, new, positions) for old, new in zip(packed.planes, planes, strict=True)),
        scale=_put(packed.scale, q.scale, positions),
        zero=_put(packed.zero, q.zero, positions),
    )


def write_blocks(
    packed: Packed, x: Float[Array, "B N R K D"], mask: Bool[Array, "B N R"], index: Int[Array, "B N"]
) -> Packed:
    """Stores N blocks of R tokens per sequence at block indices; indices at or beyond S/R are dropped.

    mask: tokens that enter minima and maxima.
    """
    format = packed.format
    blocks = x.swapaxes(2, 3)  # [B, N, K, R, D]
    if format.bits == EXACT:
        return packed.replace(planes=(_put_rows(packed.planes[0], blocks, index),))
    q = affine.quantize(blocks, format.bits, format.group_axis, format.group, mask[:, :, None, :, None])
    planes = packing.pack(q.codes, format.bits, format.pack_axis)
    return packed.replace(
        planes=tuple(_put_rows(old, new, index) for old, new in zip(packed.planes, planes, strict=True)),
        scale=_put_rows(packed.scale, q.scale, index),
        zero=_put_rows(packed.zero, q.zero, index),
    )


def _put(store: Array, rows: Float[Array, "B T K W"], positions: Int[Array, "B T"]) -> Array:
    batch = jnp.arange(store.shape[0])[:, None]
    return store.at[batch, :, positions].set(rows.astype(store.dtype), mode="drop")


def _put_rows(store: Array, blocks: Float[Array, "B N K r W"], index: Int[Array, "B N"]) -> Array:
    count, rows = blocks.shape[1], blocks.shape[3]
    at = (index[:, :, None] * rows + jnp.arange(rows)).reshape(store.shape[0], count * rows)
    return _put(store, blocks.swapaxes(2, 3).reshape(store.shape[0], count * rows, *store.shape[1::2]), at)


def read_block(packed: Packed, start: Int[Array, ""] | int, size: int, dtype) -> Float[Array, "B K size D"]:
    """Tokens [start, start + size), dequantised; both are multiples of the format's block."""
    format = packed.format

    def rows(a: Array, numerator: int, denominator: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, start * numerator // denominator, size * numerator // denominator, 2)

    if format.bits == EXACT:
        return rows(packed.planes[0], 1, 1).astype(dtype)
    by_token = format.pack_axis == -2
    planes = tuple(
        rows(plane, width, 8) if by_token else rows(plane, 1, 1)
        for plane, width in zip(packed.planes, packing.PLANES[format.bits], strict=True)
    )
    if by_token:  # each block was packed on its own
        planes = tuple(p.reshape(*p.shape[:2], size // format.block, -1, p.shape[3]) for p in planes)
    codes = packing.unpack(planes, format.bits, format.pack_axis)
    codes = codes.reshape(*codes.shape[:2], size, codes.shape[-1])
    per = format.group if format.per == "channel" else 1
    q = affine.Quantized(codes, rows(packed.scale, 1, per), rows(packed.zero, 1, per))
    return affine.dequantize(q, format.group_axis, format.group, dtype)
