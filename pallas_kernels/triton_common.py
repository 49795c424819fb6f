"""What the Triton kernels share: which bytes hold which tokens, and how bytes become floats.

Attention does not care about the order of tokens, so codes are never interleaved. A program's block of tokens falls
into sub-tiles, at the finest granularity of all planes it reads: runs of tokens that lie at one shift of every plane.
A sub-tile is then, in every plane, a set of whole byte rows and one shift.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt8

from pallas_kernels.layout import EXACT, PLANES, Packed

LOG2_E = math.log2(math.e)
LIFT = 1024.0  # float16 probabilities are stored this much larger, away from its smallest numbers
PROGRAMS = 2 * 132  # enough to fill a large GPU
SMALLEST = 16  # what a tensor core multiplies at least along the summed axis
BYTES = 0x01010101  # a mask of one byte, times this, masks the four bytes of a register


def power_of_two(x: int) -> bool:
    return x & (x - 1) == 0


def quotient(x: Int32[Array, "*s"], y: int) -> Int32[Array, "*s"]:
    """x // y of what is not negative, without the instructions by which `//` minds the sign."""
    return jax.lax.div(x, jnp.full(x.shape, y, x.dtype))


def remainder(x: Int32[Array, "*s"], y: int) -> Int32[Array, "*s"]:
    """x % y of what is not negative."""
    return jax.lax.rem(x, jnp.full(x.shape, y, x.dtype))


def dot(a: Float[Array, "_ _"], b: Float[Array, "_ _"], over_a: int, over_b: int) -> Float32[Array, "_ _"]:
    """The product over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def span(start: Array, stop: Array, tokens: int, first: int, window: int | None) -> tuple[Array, Array]:
    """The first position that any of `tokens` queries sees, and the end of those."""
    low = jnp.int32(first) if window is None else jnp.maximum(first, start + 1 - window)
    return low, jnp.minimum(stop, start + tokens)


def share(low: Array, end: Array, block: int, splits: int, index: Array) -> tuple[Array, Array]:
    """The blocks that hold positions from `low` to `end`: those of split `index`, from one to before another."""
    begin, end = low // block, pl.cdiv(end, block)
    each = pl.cdiv(jnp.maximum(end - begin, 0), splits)
    begin += index * each
    return begin, jnp.minimum(begin + each, end)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The static half of a packed tensor: what a kernel knows when it is traced."""

    bits: int
    per: str
    group: int
    pack: int
    tokens: int
    channels: int

    @classmethod
    def of(cls, packed: Packed) -> Stored:
        return cls(packed.bits, packed.per, packed.group, packed.pack, packed.shape[2], packed.shape[3])

    @property
    def exact(self) -> bool:
        return self.bits == EXACT

    @property
    def widths(self) -> tuple[int, ...]:
        return (8,) if self.exact else PLANES[self.bits]

    @property
    def groups(self) -> int:
        """Groups a token's channels fall into, as far as scales differ between them."""
        return 1 if self.exact or self.per == "channel" else self.channels // self.group


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A power of two of channels within which groups are equal and powers of two, too, or that one group holds."""

    start: int | Array
    width: int
    group: int | Array  # the first group
    groups: int

    def channels(self) -> Int32[Array, "width"]:
        return self.start + jnp.arange(self.width)


def piece_width(stored: Stored, widest: int) -> int:
    """Of pieces that are all alike, for a loop over them; at most `widest`."""
    group = stored.channels // stored.groups
    size = stored.channels if power_of_two(group) else group
    width = min(size & -size, widest)
    if width < SMALLEST:
        raise NotImplementedError(f"{stored.channels} channels in groups of {group}: not in pieces of {SMALLEST}")
    return width


def piece_at(stored: Stored, width: int, index: Array) -> Piece:
    """Piece `index` of those that are all `width` wide."""
    group = stored.channels // stored.groups
    return Piece(index * width, width, quotient(index * width, group), max(1, width // group))


def pieces(stored: Stored, *, whole: bool) -> list[Piece]:
    """The channels in pieces: of one group each, or (`whole`) of as many groups as go into a power of two."""
    group = stored.channels // stored.groups
    unit = stored.channels if whole and power_of_two(group) else group
    cut = []
    for start in range(0, stored.channels, unit):
        left = unit
        while left:
            width = 1 << left.bit_length() - 1
            if width < SMALLEST:
                raise NotImplementedError(
                    f"{stored.channels} channels in groups of {group}: not in pieces of {SMALLEST}"
                )
            at = start + unit - left
            cut.append(Piece(at, width, at // group, max(1, width // group)))
            left -= width
    return cut


@dataclasses.dataclass(frozen=True)
class Cut:
    """Blocks of `repeats` spans; a span falls into runs of `run` tokens, and run m of every span forms sub-tile m."""

    span: int
    run: int
    repeats: int

    @property
    def block(self) -> int:
        return self.span * self.repeats

    @property
    def rows(self) -> int:
        """Tokens of a sub-tile."""
        return self.run * self.repeats

    @property
    def tiles(self) -> int:
        return self.span // self.run

    def spans(self, block: Array) -> Int32[Array, "rows"]:
        """The span of each token of a sub-tile."""
        return block * self.repeats + quotient(jnp.arange(self.rows), self.run)

    def positions(self, block: Array, tile: int) -> Int32[Array, "rows"]:
        return self.spans(block) * self.span + tile * self.run + remainder(jnp.arange(self.rows), self.run)


def cut(streams: list[Stored], rows: int, block: int | None = None) -> Cut:
    """Blocks over tensors read side by side: of `block` tokens, or of the fewest whose sub-tiles have `rows`."""
    packed = [s for s in streams if not s.exact]
    if any(not power_of_two(s.pack) for s in packed):
        raise NotImplementedError(f"packs of {', '.join(str(s.pack) for s in packed)}; expected powers of two")
    span = max([s.pack for s in packed], default=SMALLEST)
    run = min([s.pack * min(s.widths) // 8 for s in packed], default=span)
    smallest = span * max(1, SMALLEST // run)
    if block is not None and (block % smallest or not power_of_two(block // smallest)):
        raise NotImplementedError(f"blocks of {block} tokens; expected {smallest} times a power of two")
    return Cut(span, run, block // span if block is not None else max(1, rows // run, smallest // span))


class Stream:
    """A packed tensor [S, D] of one head inside a kernel: sub-tiles of one block as floats.

    Bytes and scales are loaded once each, however many sub-tiles use them.
    """

    def __init__(self, refs: Packed, stored: Stored, cut: Cut, block: Array, interpret: bool) -> None:
        self.refs, self.stored, self.cut, self.block, self.interpret = refs, stored, cut, block, interpret
        self._loaded: dict = {}

    def values(self, tile: int, piece: Piece, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        """Of an exact tensor."""
        return self._bytes(0, tile, piece).astype(dtype)

    def codes(self, tile: int, piece: Piece, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        """Codes plus `offset(dtype)`, exact in float32 and bfloat16."""
        if dtype == jnp.float32 or self.interpret:
            return (self._codes(tile, piece).astype(jnp.float32) + self.offset(dtype)).astype(dtype)
        words, shifts = self._words(tile, piece)
        return _inline(_unpack(self.stored.widths, shifts, 2) + _bfloat16(self.stored.bits), words, dtype)

    def offset(self, dtype: jnp.dtype) -> int:
        """What `codes` adds: the float whose last digits a code replaces, left in, since it can be subtracted from
        sums more cheaply than from every code."""
        return 0 if dtype == jnp.float32 else -128 if self.stored.bits == 8 else 128

    def dequantized(self, tile: int, piece: Piece, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        """codes * scale + zero in float32 or float16."""
        scale, zero = (self._spread(part, tile, piece) for part in ("scale", "zero"))
        if dtype == jnp.float32 or self.interpret:
            codes = self._codes(tile, piece).astype(jnp.float32)
            return (codes * scale.astype(jnp.float32) + zero.astype(jnp.float32)).astype(dtype)
        words, shifts = self._words(tile, piece)
        return _inline(
            _unpack(self.stored.widths, shifts, 2) + _float16(2 + len(words)), [*words, scale, zero], dtype
        )

    def token_scale(self, part: str, tile: int, group: int | Array) -> Float32[Array, "rows"]:
        """Scale or zero point of one group of channels, per token."""
        at = self._within(self.cut.positions(self.block, tile), self.stored.tokens)
        return getattr(self.refs, part)[group, at].astype(jnp.float32)

    def token_scales(
        self, part: str, tile: int, piece: Piece, groups: int, each: int
    ) -> Float32[Array, "rows groups*each"]:
        """Scales or zero points of a piece's groups (padded with the last to `groups`), each `each` times."""
        scales = self._token_groups(part, tile, piece, groups).astype(jnp.float32)
        rows = self.cut.rows
        return jnp.broadcast_to(scales[:, :, None], (rows, groups, each)).reshape(rows, groups * each)

    def _token_groups(self, part: str, tile: int, piece: Piece, groups: int) -> Float16[Array, "rows groups"]:
        at = self._within(self.cut.positions(self.block, tile), self.stored.tokens)
        group = piece.group + jnp.minimum(jnp.arange(groups), piece.groups - 1)
        return getattr(self.refs, part)[group[None, :], at[:, None]]

    def _spread(self, part: str, tile: int, piece: Piece) -> Float16[Array, "rows width"]:
        """Scales or zero points of every value."""
        rows = self.cut.rows
        if self.stored.per == "token":
            shape = (rows, piece.groups, piece.width // piece.groups)
            scales = self._token_groups(part, tile, piece, piece.groups)
            return jax.lax.broadcast_in_dim(scales, shape, (0, 1)).reshape(rows, piece.width)
        cell = math.gcd(self.stored.group, self.cut.run)  # tokens that share scales for sure
        scales = self._cells(part, tile, piece, cell)
        shape = (rows // cell, cell, piece.width)
        return jax.lax.broadcast_in_dim(scales, shape, (0, 2)).reshape(rows, piece.width)

    def _cells(self, part: str, tile: int, piece: Piece, cell: int) -> Float16[Array, "cells width"]:
        """Scales or zero points of channels, a row for each `cell` tokens of a sub-tile."""
        span, run, group = self.cut.span, self.cut.run, self.stored.group
        each = run // cell
        index = jnp.arange(self.cut.repeats * each)
        spans, within = self.block * self.cut.repeats + quotient(index, each), remainder(index, each) * cell
        if group % span == 0:
            key, row = 0, quotient(spans, group // span)
        elif span % group == 0 and cell == run:
            key = tile * run // group
            row = spans * (span // group) + key
        else:
            key, row = tile, quotient(spans * span + tile * run + within, group)
        row = self._within(row, self.stored.tokens // group)
        load = lambda: getattr(self.refs, part)[row[:, None], piece.channels()[None, :]]  # noqa: E731
        return self._once((part, key, piece), load)

    def _words(self, tile: int, piece: Piece) -> tuple[list[UInt8[Array, "rows width"]], list[int]]:
        """The bytes of a sub-tile in each plane, and the shifts at which it stands there."""
        within = [tile * self.cut.run % self.stored.pack // (self.stored.pack * w // 8) for w in self.stored.widths]
        words = [self._bytes(plane, tile, piece) for plane in range(len(self.stored.widths))]
        return words, [w * i for w, i in zip(self.stored.widths, within, strict=True)]

    def _codes(self, tile: int, piece: Piece) -> UInt8[Array, "rows width"]:
        parts, low = [], 0
        words, shifts = self._words(tile, piece)
        for width, word, shift in zip(self.stored.widths, words, shifts, strict=True):
            parts.append(((word >> shift) & ((1 << width) - 1)) << low)
            low += width
        return functools.reduce(operator.or_, parts)

    def _bytes(self, plane: int, tile: int, piece: Piece) -> Array:
        """[rows, width] of a plane: bytes, or the values themselves where they are exact."""
        stored, width = self.stored, self.stored.widths[plane]
        first = tile * self.cut.run
        if not stored.exact:
            run = stored.pack * width // 8
            first = first // stored.pack * run + first % stored.pack % run
        row = (
            self.cut.spans(self.block) * (self.cut.span * width // 8)
            + first
            + remainder(jnp.arange(self.cut.rows), self.cut.run)
        )
        row = self._within(row, stored.tokens * width // 8)
        load = lambda: self.refs.planes[plane][row[:, None], piece.channels()[None, :]]  # noqa: E731
        return self._once((plane, first, piece), load)

    def _within(self, index: Int32[Array, "n"], size: int) -> Int32[Array, "n"]:
        """Clipped, where the last block may reach past the buffer."""
        return index if self.stored.tokens % self.cut.block == 0 else jnp.minimum(index, size - 1)

    def _once(self, key, load):
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]


def _unpack(widths: tuple[int, ...], shifts: list[int], first: int) -> str:
    """PTX: register t is the codes of four bytes, from the planes' bytes in operands `first` and on."""
    lines, low = [".reg .b32 t, u, a, b, c, d, m; mov.b32 t, 0;"], 0
    for plane, (width, shift) in enumerate(zip(widths, shifts, strict=True)):
        move = (
            f"shr.b32 u, ${first + plane}, {shift - low};"
            if shift >= low
            else f"shl.b32 u, ${first + plane}, {low - shift};"
        )
        lines.append(f"{move} and.b32 u, u, {((1 << width) - 1 << low) * BYTES:#x}; or.b32 t, t, u;")
        low += width
    return " ".join(lines)


def _bfloat16(bits: int) -> str:
    """PTX: codes in t as bfloat16 by writing them into the mantissa of 128, where they fill 7 bits at most.

    Codes of 8 bits: the low 7 that way, minus 128 or 256 as the high bit says, is the code minus 128."""
    spread = "mov.b32 m, 0x43434343; prmt.b32 {0}, {2}, m, 0x4140; prmt.b32 {1}, {2}, m, 0x4342;"
    if bits < 8:
        return spread.format("$0", "$1", "t")
    high = "not.b32 u, t; and.b32 u, u, 0x80808080; and.b32 t, t, 0x7f7f7f7f;"
    minus = "mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, c, m, a; fma.rn.bf16x2 $1, d, m, b;"
    return f"{high} {spread.format('a', 'b', 't')} {spread.format('c', 'd', 'u')} {minus}"


def _float16(first: int) -> str:
    """PTX: codes in t as float16 through the mantissa of 1024, times scale plus zero from operands `first` and on."""
    spread = "mov.b32 m, 0x64646464; prmt.b32 a, t, m, 0x4140; prmt.b32 b, t, m, 0x4342;"
    minus = "mov.b32 m, 0x64006400; sub.rn.f16x2 a, a, m; sub.rn.f16x2 b, b, m;"
    scaled = f"fma.rn.f16x2 $0, a, ${first}, ${first + 2}; fma.rn.f16x2 $1, b, ${first + 1}, ${first + 3};"
    return f"{spread} {minus} {scaled}"


def _inline(code: str, args: list[Array], dtype: jnp.dtype) -> Float[Array, "rows width"]:
    """Four elements at a time. Results may not share registers with arguments, which are read after the first."""
    registers = sum(1 if arg.dtype.itemsize == 1 else 2 for arg in args)
    constraints = ",".join(["=&r", "=&r", *["r"] * registers])
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [out] = plgpu.elementwise_inline_asm(
        f"{{ {code} }}", args=args, constraints=constraints, pack=4, result_shape_dtypes=[result]
    )
    return out


def heads_spec(array: Array) -> pl.BlockSpec:
    """All of one head of [B, K, ...], for a grid whose first axes are B and K."""
    rest = array.shape[2:]
    return pl.BlockSpec((None, None, *rest), lambda b, k, *_: (b, k, *[0] * len(rest)))
