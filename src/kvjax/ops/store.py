"""The stored history of one tensor (keys or values): written token by token or in blocks, read in tiles.

The layout is that of pallas_kernels/layout.py: codes [B, K, rows, D], planar along the tokens of a packing block, so
that a block unpacks with a shift and a mask of whole rows; scales and zero points [B, K, D/group, S] per token,
[B, K, S/group, D] per channel, in float16 or a byte each; gains of tokens [B, K, 1, S] per channel, of channels
[B, K, S/R, D] per token. A single token is written by replacing its bits in
the bytes of its packing block.
B batch, K kv heads, S allocated tokens, D head_dim.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from kvjax.errors import KvjaxError
from kvjax.ops.dispatch import dispatch
from kvjax.quant import affine, packing, scales
from kvjax.quant.gains import Gain, gains_of
from pallas_kernels import layout
from pallas_kernels.layout import EXACT
from pallas_kernels.quantize_pack import FITS, quantize_pack

T = TypeVar("T")
PACK = 32  # tokens per packing block where tokens are written one by one


@dataclasses.dataclass(frozen=True)
class Format:
    """How one tensor is stored.

    Attributes:
      bits: code width, or 16 for the values themselves in the cache's dtype.
      per: "token" (groups of `group` channels of a token) or "channel" (groups of `group` tokens of a channel).
      group: elements that share a scale and a zero point.
      residual_length: tokens written together; 0 where tokens are written one by one.
      fit: how scales and zero points are chosen, see `affine.quantize`; no reader needs to know.
      scale_bits: bits of a scale and of a zero point, 16 or 8 (kvjax/quant/scales.py).
      gain: what blocks are divided by before they are quantised (kvjax/quant/gains.py).
    """

    bits: int
    per: str
    group: int
    residual_length: int
    fit: affine.Fit = "minmax"
    scale_bits: int = 16
    gain: Gain = "none"

    def __post_init__(self) -> None:
        if self.residual_length % 8:
            raise KvjaxError(f"residual {self.residual_length}: expected a multiple of 8")
        if self.gain != "none" and self.residual_length == 0:
            raise KvjaxError("residual 0: expected a positive one, because gains are of blocks")
        if self.per == "channel" and (self.residual_length == 0 or self.residual_length % self.group):
            raise KvjaxError(
                f"residual {self.residual_length}: expected a positive multiple of the token group {self.group}"
            )

    @property
    def pack_size(self) -> int:
        """Tokens that are packed together."""
        return self.residual_length or (1 if self.bits == EXACT else PACK)

    @property
    def group_axis(self) -> int:
        return -1 if self.per == "token" else -2

    @property
    def bits_asymptotic(self) -> float:
        """Bits per element, scale and zero point included, gains not."""
        return self.bits if self.bits == EXACT else self.bits + 2 * self.scale_bits / self.group

    @property
    def has_gain(self) -> bool:
        """Whether gains are stored: not of exact values."""
        return self.gain != "none" and self.bits != EXACT

    def gain_bits(self, width: int) -> float:
        """Bits of gains per element of a tensor of `width` channels."""
        return 16 / (width if self.per == "channel" else self.residual_length) if self.has_gain else 0

    @property
    def levels(self) -> Float[Array, ""]:
        """The largest code."""
        return jnp.float32(2**self.bits - 1)


class RowFormat(abc.ABC):
    """A custom quantiser that encodes each row (one token of one head) alone. Subclasses are frozen dataclasses."""

    bits: ClassVar[int] = 0  # not a code width of `Format`
    pack_size: ClassVar[int] = 1

    @property
    @abc.abstractmethod
    def bits_asymptotic(self) -> float:
        """Bits per element, counting everything that `encode` returns."""

    @abc.abstractmethod
    def encode(self, x: Float[Array, "... D"]) -> tuple[Array, ...]:
        """Encodes rows as arrays [..., w] of any widths and types."""

    @abc.abstractmethod
    def decode(self, kept: tuple[Array, ...], dtype: Any) -> Float[Array, "... D"]:
        """Decodes rows from the arrays of `encode`, in `dtype`."""


AnyFormat = Format | RowFormat


@struct.dataclass
class RowStore:
    """The history as the arrays that a `RowFormat` encodes."""

    kept: tuple[Shaped[Array, "B K S _"], ...]
    format: Any = struct.field(pytree_node=False)  # RowFormat

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.kept[0].shape[2]

    @property
    def heads(self) -> int:
        return self.kept[0].shape[1]

    def write(self, x: Float[Array, "B T K D"], positions: Int[Array, "B T"]) -> RowStore:
        """Stores tokens.

        Args:
          x: values of T tokens.
          positions: where each is stored; tokens at positions at or beyond S are dropped.

        Returns:
          The history with the tokens stored.
        """
        pairs = zip(self.kept, self.format.encode(x), strict=True)
        return dataclasses.replace(self, kept=tuple(_put(old, new, positions) for old, new in pairs))

    def read(self, start: Int[Array, ""] | int, size: int, dtype: Any) -> Tile:
        """Reads tokens [start, start + size), decoded to `dtype`."""
        kept = tuple(jax.lax.dynamic_slice_in_dim(a, start, size, 2) for a in self.kept)
        return Tile(self.format.decode(kept, jnp.promote_types(dtype, jnp.float32)).astype(dtype))


@struct.dataclass
class PackedStore:
    """The history in packed form: byte planes (or the exact values), scales, zero points and gains."""

    planes: tuple[Array, ...]
    scale: Any  # Array, None where exact; zero likewise
    zero: Any
    format: Format = struct.field(pytree_node=False)
    gain: Any = None  # Array, None where the format has none

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        width = 8 if self.format.bits == EXACT else packing.PLANES[self.format.bits][0]
        return self.planes[0].shape[2] * 8 // width

    @property
    def heads(self) -> int:
        return self.planes[0].shape[1]

    def widened(self, scale: Array, zero: Array) -> tuple[Array, Array]:
        """Some of its scales and zero points, in float16."""
        return scales.from_bytes(scale, zero, self.format.levels) if self.format.scale_bits == 8 else (scale, zero)


@struct.dataclass
class UnpackedStore:
    """The history with one byte per code, and scales in float16.

    The code width is data, so that one compiled program serves all widths up to 8 bits.
    """

    codes: UInt8[Array, "B K S D"]
    scale: Array
    zero: Array
    levels: Float[Array, ""]  # 2^b - 1
    format: Format = struct.field(pytree_node=False)  # of any width: `levels` gives the actual one
    gain: Any = None

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.codes.shape[2]

    @property
    def heads(self) -> int:
        return self.codes.shape[1]


Stored = PackedStore | UnpackedStore | RowStore


def exact(x: Float[Array, "B K S D"]) -> PackedStore:
    """Wraps values, unquantised, as a history."""
    return PackedStore((x,), None, None, Format(EXACT, "token", 1, 0))


def for_kernels(stored: Stored) -> layout.Packed:
    """Converts a history to the type that kernels take; the arrays are the same but for scales in 8 bits.

    Args:
      stored: a history.

    Returns:
      The packed tensor.

    Raises:
      NotImplementedError: the history is not a `PackedStore` one, or has gains.
    """
    if not isinstance(stored, PackedStore):
        kind = type(stored.format).__name__ if isinstance(stored, RowStore) else "codes whose width is data"
        raise NotImplementedError(f"{kind}; kernels read the packed layout, of a width that is known")
    if stored.gain is not None:
        raise NotImplementedError("gains of tokens or channels; kernels read scales and zero points alone")
    form, wide = stored.format, stored.widened(stored.scale, stored.zero)
    return layout.Packed(stored.planes, *wide, form.bits, form.per, form.group, form.pack_size)


def unpacked(packed: PackedStore, levels: Float[Array, ""]) -> UnpackedStore:
    """Unpacks a history.

    Args:
      packed: the history.
      levels: the largest code of later writes, 2^b - 1.

    Returns:
      The history with one byte per code.
    """
    codes = read_tile(packed, 0, packed.tokens, jnp.uint8).codes
    return UnpackedStore(codes, *packed.widened(packed.scale, packed.zero), levels, packed.format, packed.gain)


def capacity(max_len: int, *formats: AnyFormat, block: int = 1, parts: int = 1) -> int:
    """Returns the number of tokens to allocate.

    Args:
      max_len: tokens that must fit.
      *formats: the formats of the tensors that are stored side by side.
      block: tokens that are stored together.
      parts: among how many devices they are divided.

    Returns:
      `max_len` rounded up to whole blocks, and whole packing blocks of every format, on every device.
    """
    # The same for all formats with the same block: XQuant-CL's accumulator is divided like the store it is read with.
    pack = math.lcm(block, *(format.pack_size for format in formats), PACK if parts > 1 else 1) * parts
    return -(-max_len // pack) * pack


def init(format: AnyFormat, batch: int, kv_heads: int, tokens: int, head_dim: int, dtype) -> PackedStore | RowStore:
    """Allocates an empty history.

    Args:
      format: how the tensor is stored.
      batch: sequences B.
      kv_heads: heads K.
      tokens: tokens S, a `capacity` of the format.
      head_dim: channels D of a head.
      dtype: dtype of unquantised values.

    Returns:
      The history, all zeros.
    """

    def rows(count: int, channels: int, dtype) -> Array:
        return jnp.zeros((batch, kv_heads, count, channels), dtype)

    if isinstance(format, RowFormat):
        kept = jax.eval_shape(format.encode, rows(tokens, head_dim, dtype))
        return RowStore(tuple(jnp.zeros(a.shape, a.dtype) for a in kept), format)
    if format.bits == EXACT:
        return PackedStore((rows(tokens, head_dim, dtype),), None, None, format)
    planes = tuple(rows(tokens * width // 8, head_dim, jnp.uint8) for width in packing.PLANES[format.bits])
    groups = (head_dim // format.group, tokens) if format.per == "token" else (tokens // format.group, head_dim)
    of_scales = jnp.uint8 if format.scale_bits == 8 else jnp.float16
    gains = (1, tokens) if format.per == "channel" else (tokens // max(format.residual_length, 1), head_dim)
    gain = rows(*gains, jnp.float16) if format.has_gain else None
    return PackedStore(planes, rows(*groups, of_scales), rows(*groups, of_scales), format, gain)


def logical_axes(packed: Stored, heads: str | None, tokens: str | None = "tokens") -> Stored:
    """Names the axes of every array of a history.

    Args:
      packed: the history.
      heads: logical name of the axis of heads; None where it is not sharded.
      tokens: likewise, of the axis of tokens.

    Returns:
      The same tree with a PartitionSpec of logical names at every leaf.
    """
    rows, last = PartitionSpec("batch", heads, tokens), PartitionSpec("batch", heads, None, tokens)
    if isinstance(packed, RowStore):
        return RowStore((rows,) * len(packed.kept), packed.format)  # type: ignore[arg-type]
    of_scales, of_gains = (last, rows) if packed.format.per == "token" else (rows, last)
    scale, gain = None if packed.scale is None else of_scales, None if packed.gain is None else of_gains
    if isinstance(packed, UnpackedStore):
        return UnpackedStore(rows, scale, scale, PartitionSpec(), packed.format, gain)  # type: ignore[arg-type]
    return PackedStore((rows,) * len(packed.planes), scale, scale, packed.format, gain)  # type: ignore[arg-type]


def write_tokens(
    packed: Stored,
    x: Float[Array, "B T K D"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
    ring: bool = False,
) -> Stored:
    """Stores tokens one by one: each is quantised alone.

    Args:
      packed: the history.
      x: values of T tokens.
      start: per sequence, the position of the first token; the others follow. Those below 0 are dropped.
      lengths: per sequence, how many of the T tokens are stored.
      ring: whether positions count modulo S; the tokens then lie in at most S / `pack_size` packing blocks.

    Returns:
      The history with the tokens stored.
    """
    format, tokens = packed.format, x.shape[1]
    step = jnp.arange(tokens)
    at = start[:, None] + step
    at = at % packed.tokens if ring else at
    at = jnp.where((step < lengths[:, None]) & (at >= 0), at, packed.tokens)  # out of range: dropped
    if isinstance(packed, RowStore):
        return packed.write(x, at)
    if isinstance(packed, UnpackedStore):
        q = affine.quantize_to(x, packed.levels, -1, format.group, None, format.fit, format.scale_bits)
        scale, zero = _put_last(packed.scale, q.scale, at), _put_last(packed.zero, q.zero, at)
        return dataclasses.replace(packed, codes=_put(packed.codes, q.codes, at), scale=scale, zero=zero)
    if format.bits == EXACT:
        return dataclasses.replace(packed, planes=(_put(packed.planes[0], x, at),))
    q = affine.quantize(x, format.bits, -1, format.group, None, format.fit, format.scale_bits)
    # Codes aligned to packing blocks, and the bits of the blocks that they replace.
    count = (tokens + format.pack_size - 2) // format.pack_size + 1
    slot = jnp.arange(count * format.pack_size) - (start % format.pack_size)[:, None]
    new = (slot >= 0) & (slot < lengths[:, None])
    codes = jnp.take_along_axis(q.codes, jnp.clip(slot, 0, tokens - 1)[:, :, None, None], 1)
    codes = jnp.where(new[:, :, None, None], codes, 0)
    index = (start // format.pack_size)[:, None] + jnp.arange(count)
    index = index % (packed.tokens // format.pack_size) if ring else index
    some = new.reshape(-1, count, format.pack_size).any(-1) & (index >= 0)
    index = jnp.where(some, index, packed.tokens // format.pack_size)
    full = jnp.broadcast_to(new[:, :, None, None] * jnp.uint8(2**format.bits - 1), (*new.shape, 1, 1))
    planes = tuple(
        _put_rows(old, word | (_get_rows(old, index, word.shape[3]) & ~replaced), index)
        for old, word, replaced in zip(
            packed.planes, _pack_blocks(codes, format), _pack_blocks(full, format), strict=True
        )
    )
    scale, zero = _narrowed(q, format)
    scale, zero = _put_last(packed.scale, scale, at), _put_last(packed.zero, zero, at)
    return dataclasses.replace(packed, planes=planes, scale=scale, zero=zero)


def _narrowed(q: affine.Quantized, format: Format) -> tuple[Array, Array]:
    """Scales and zero points as a `PackedStore` keeps them."""
    return scales.to_bytes(q.scale, q.zero, format.levels) if format.scale_bits == 8 else (q.scale, q.zero)


def _pack_blocks(codes: Array, format: Format) -> tuple[Array, ...]:
    """Packs codes [B, N*P, K, D] into planes [B, N, K, P*w/8, D]."""
    batch, _, kv_heads, head_dim = codes.shape
    blocks = codes.reshape(batch, -1, format.pack_size, kv_heads, head_dim).swapaxes(2, 3)
    return packing.pack(blocks, format.bits)


def write_blocks(
    packed: Stored, x: Float[Array, "B N R K D"], mask: Bool[Array, "B N R"], index: Int[Array, "B N"]
) -> Stored:
    """Stores whole blocks of R tokens.

    Args:
      packed: the history.
      x: values of N blocks per sequence.
      mask: tokens that count towards minima and maxima.
      index: where each block is stored, in blocks; blocks below 0 and those at or beyond S/R are dropped.

    Returns:
      The history with the blocks stored.
    """
    index = jnp.where(index < 0, packed.tokens // x.shape[2], index)
    if isinstance(packed, RowStore):
        return packed.write(x.reshape(x.shape[0], -1, *x.shape[3:]), _rows(index, x.shape[2]))
    format = packed.format
    blocks = x.swapaxes(2, 3)  # [B, N, K, R, D]
    if isinstance(packed, UnpackedStore):
        counted = mask[:, :, None, :, None]
        how = format.group_axis, format.group, counted, format.fit, format.scale_bits
        even, gain = _evened(blocks, mask, format)
        q = affine.quantize_to(even, packed.levels, *how)
        codes, scale, zero = _put_rows(packed.codes, q.codes, index), *_put_scales(packed, q.scale, q.zero, index)
        return dataclasses.replace(packed, codes=codes, scale=scale, zero=zero, gain=_put_gain(packed, gain, index))
    if format.bits == EXACT:
        return dataclasses.replace(packed, planes=(_put_rows(packed.planes[0], blocks, index),))

    def encode():
        even, gain = _evened(blocks, mask, format)
        return *_encode_blocks(even, mask, format), gain

    planes, scale, zero, gain = where_any(index * format.residual_length < packed.tokens, encode)
    planes = tuple(_put_rows(old, new, index) for old, new in zip(packed.planes, planes, strict=True))
    scale, zero = _put_scales(packed, scale, zero, index)
    return dataclasses.replace(packed, planes=planes, scale=scale, zero=zero, gain=_put_gain(packed, gain, index))


def where_any(needed: Bool[Array, "..."], make: Callable[[], T]) -> T:
    """What `make` gives where any is needed, else zeros: most steps of a decode complete no block.

    For small new rows only: XLA copies whatever a conditional returns, and would copy the history.
    """
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(make))
    return jax.lax.cond(needed.any(), make, lambda: nothing)


def _evened(
    blocks: Float[Array, "B N K R D"], mask: Bool[Array, "B N R"], format: Format
) -> tuple[Float[Array, "B N K R D"], Any]:
    """Blocks divided by their gains, and the gains, as `gains_of` gives them; None where the format has none."""
    if not format.has_gain:
        return blocks, None
    gain = gains_of(blocks, mask[:, :, None, :, None], format.per, format.gain)
    return blocks / gain.astype(jnp.promote_types(blocks.dtype, jnp.float32)), gain


def _encode_blocks(
    blocks: Float[Array, "B N K R D"], mask: Bool[Array, "B N R"], format: Format
) -> tuple[tuple[Array, ...], Array, Array]:
    """Planes [B, N, K, R*w/8, D] of blocks, and their scales and zero points as `_put_scales` takes them."""

    def xla(blocks: Array, mask: Array):
        counted = mask[:, :, None, :, None]
        how = format.group_axis, format.group, counted, format.fit, format.scale_bits
        q = affine.quantize(blocks, format.bits, *how)
        return packing.pack(q.codes, format.bits), *_narrowed(q, format)

    def kernel(name: str, interpret: bool, blocks: Array, mask: Array):
        if format.scale_bits == 8:
            raise NotImplementedError("scales in 8 bits; kernels write float16")
        if format.fit not in FITS:
            raise NotImplementedError(
                f"fit={format.fit}; kernels take scales from minimum and maximum or the squared error"
            )
        how: dict[str, Any] = {"bits": format.bits, "per": format.per, "group": format.group, "fit": format.fit}
        flat, each = blocks.reshape(-1, *blocks.shape[2:]), mask.reshape(-1, mask.shape[2])
        made = quantize_pack(flat, each, **how, implementation=name, interpret=interpret)
        planes, scale, zero = jax.tree.map(lambda a: a.reshape(*mask.shape[:2], *a.shape[1:]), made)
        return planes, *((scale, zero) if format.per == "channel" else (a.swapaxes(3, 4) for a in (scale, zero)))

    by_head = PartitionSpec("batch", None, "kv_heads")
    return dispatch("quantize_pack", kernel, xla, (blocks, mask), (by_head, PartitionSpec("batch")), by_head)


def _put_scales(
    packed: PackedStore | UnpackedStore, scale: Array, zero: Array, index: Int[Array, "B N"]
) -> tuple[Array, Array]:
    """Stores scales and zero points of blocks, [B, N, K, R, G] per token or [B, N, K, R/group, D] per channel."""
    if packed.format.per == "channel":
        return _put_rows(packed.scale, scale, index), _put_rows(packed.zero, zero, index)
    at = _rows(index, packed.format.residual_length)
    scale, zero = (a.swapaxes(2, 3).reshape(*at.shape, a.shape[2], a.shape[4]) for a in (scale, zero))
    return _put_last(packed.scale, scale, at), _put_last(packed.zero, zero, at)


def _put_gain(packed: PackedStore | UnpackedStore, gain: Any, index: Int[Array, "B N"]) -> Any:
    """Stores gains of blocks, [B, N, K, R, 1] per channel or [B, N, K, 1, D] per token; None where there are none."""
    if gain is None:
        return None
    if packed.format.per == "token":
        return _put_rows(packed.gain, gain, index)
    at = _rows(index, packed.format.residual_length)
    return _put_last(packed.gain, gain.swapaxes(2, 3).reshape(*at.shape, gain.shape[2], 1), at)


def _put(store: Array, rows: Float[Array, "B T K W"], positions: Int[Array, "B T"]) -> Array:
    """Stores rows at positions of an array [B, K, S, W]."""
    rows = rows.astype(store.dtype)
    if store.dtype == jnp.bfloat16:  # scattered as integers: XLA's CPU backend would widen the whole store
        return _put(store.view(jnp.uint16), rows.view(jnp.uint16), positions).view(jnp.bfloat16)
    return _scatter(store, rows.swapaxes(1, 2), positions, 2)


def _put_last(store: Array, values: Float[Array, "B T K G"], positions: Int[Array, "B T"]) -> Array:
    """Stores values at positions of an array [B, K, G, S]."""
    return _scatter(store, values.transpose(0, 2, 3, 1), positions, 3)


def _scatter(store: Array, new: Array, positions: Int[Array, "B T"], axis: int) -> Array:
    """Stores entries at positions of `axis`; positions out of range are dropped.

    All axes before it are batching dimensions, so that devices that share batch and heads write without asking one
    another. Every head has indices of its own: XLA turns a scatter of one window into an update that copies the
    whole store.
    """
    put = lambda old, new, at: old.at[at].set(new, mode="drop")  # noqa: E731
    for _ in range(axis):
        put = jax.vmap(put)
    at = positions.reshape(len(positions), *(1,) * (axis - 1), -1)
    return put(store, new, jnp.broadcast_to(at, (*store.shape[:axis], positions.shape[1])))


def _rows(index: Int[Array, "B N"], count: int) -> Int[Array, "B N*count"]:
    return (index[:, :, None] * count + jnp.arange(count)).reshape(index.shape[0], -1)


def _put_rows(store: Array, blocks: Float[Array, "B N K r W"], index: Int[Array, "B N"]) -> Array:
    batch, count, kv_heads, rows, width = blocks.shape
    return _put(store, blocks.swapaxes(2, 3).reshape(batch, count * rows, kv_heads, width), _rows(index, rows))


def _get_rows(store: Array, index: Int[Array, "B N"], rows: int) -> Array:
    """Reads blocks [B, N, K, rows, W]; indices out of range are clipped."""
    at = jnp.minimum(_rows(index, rows), store.shape[2] - 1)
    found = jnp.take_along_axis(store, at[:, None, :, None], 2)
    return found.reshape(*store.shape[:2], index.shape[1], rows, store.shape[3]).swapaxes(1, 2)


@struct.dataclass
class Tile:
    """n tokens of a history: x = codes * scale + zero, times the gain.

    Attributes:
      codes: the codes; the values themselves where they are exact.
      scale: one per group: [B, K, D/group, n] where groups lie along channels, else [B, K, n/group, D]; None where
        exact.
      zero: zero points, like `scale`.
      axis: -1 where groups lie along channels, -2 where they lie along tokens.
      group: elements of a group.
      gain: [B, K, n, 1] or [B, K, n, D]; None where there is none.
    """

    codes: Float[Array, "B K n D"]
    scale: Any = None
    zero: Any = None
    axis: int = struct.field(pytree_node=False, default=-1)
    group: int = struct.field(pytree_node=False, default=1)
    gain: Any = None

    @property
    def scale_per_token(self) -> bool:
        """Whether a token has one scale and zero point per head, which then fold into scores and probabilities."""
        whole = self.axis == -1 and self.group == self.codes.shape[-1]
        return self.scale is not None and self.gain is None and whole

    def dequantize(self) -> Float[Array, "B K n D"]:
        """The values, in the dtype of the codes, and rounded to it once."""
        if self.scale is None:
            return self.codes
        scale, zero = (a.swapaxes(2, 3) if self.axis == -1 else a for a in (self.scale, self.zero))
        q = affine.Quantized(self.codes, scale, zero)
        x = affine.dequantize(q, self.axis, self.group, jnp.promote_types(self.codes.dtype, jnp.float32))
        x = x if self.gain is None else x * self.gain.astype(x.dtype)
        return x.astype(self.codes.dtype)


def read_tile(packed: Stored, start: Int[Array, ""] | int, size: int, dtype) -> Tile:
    """Reads tokens [start, start + size).

    Args:
      packed: the history.
      start: the first token, a multiple of `format.pack_size`.
      size: number of tokens, likewise.
      dtype: dtype of the codes, or of the exact values.

    Returns:
      The tokens.
    """
    if isinstance(packed, RowStore):
        return packed.read(start, size, dtype)
    format = packed.format

    def rows(a: Array, numerator: int, denominator: int, axis: int = 2) -> Array:
        first, count = start * numerator // denominator, size * numerator // denominator
        return jax.lax.dynamic_slice_in_dim(a, first, count, axis)

    if isinstance(packed, UnpackedStore):
        return _tile(rows, packed, rows(packed.codes, 1, 1).astype(dtype))
    if format.bits == EXACT:
        return Tile(rows(packed.planes[0], 1, 1).astype(dtype))
    planes = tuple(
        rows(plane, width, 8) for plane, width in zip(packed.planes, packing.PLANES[format.bits], strict=True)
    )
    planes = tuple(p.reshape(*p.shape[:2], size // format.pack_size, -1, p.shape[3]) for p in planes)
    codes = packing.unpack(planes, format.bits)
    return _tile(rows, packed, codes.reshape(*codes.shape[:2], size, codes.shape[-1]).astype(dtype))


def _tile(rows: Callable[..., Array], packed: PackedStore | UnpackedStore, codes: Float[Array, "B K n D"]) -> Tile:
    format = packed.format
    where = (1, 1, 3) if format.per == "token" else (1, format.group, 2)
    scale, zero = rows(packed.scale, *where), rows(packed.zero, *where)
    if isinstance(packed, PackedStore):
        scale, zero = packed.widened(scale, zero)
    gain = packed.gain
    if gain is not None and format.per == "channel":
        gain = rows(gain, 1, 1, 3).swapaxes(2, 3)
    elif gain is not None:
        gain = jnp.repeat(rows(gain, 1, format.residual_length), format.residual_length, 2)
    return Tile(codes, scale, zero, format.group_axis, format.group, gain)
