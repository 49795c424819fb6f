"""Code that the Triton kernels share: it loads a block of a packed tensor into registers, as floats."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float16, Float32, Int32, UInt8

from pallas_kernels.gpu_layout import SMALLEST, Cut, GpuTensor, check_gpu, power_of_two, quotient, remainder
from pallas_kernels.layout import Packed


def dot(a: Float[Array, "_ _"], b: Float[Array, "_ _"], over_a: int, over_b: int) -> Float32[Array, "_ _"]:
    """Multiplies two matrices and sums in float32.

    Args:
      a: the first.
      b: the second.
      over_a: the summed axis of a.
      over_b: the summed axis of b.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def weighed(
    x: Float[Array, "rows width"], p: Float[Array, "_ _"], over_p: int, several: bool
) -> Float32[Array, "width columns"]:
    """Sums of values times weights; a value adds nothing to a column that gives it no weight, even if it is NaN.

    Args:
      x: values of tokens; those that no column weighs are finite.
      p: weights, in the dtype of x.
      over_p: the axis of p that is tokens.
      several: whether columns weigh different tokens.
    """
    if not several:
        return dot(x, p, 0, over_p)
    finite = jnp.abs(x) < jnp.inf  # false for NaN
    wrong, some = (jnp.where(a, 1.0, 0.0).astype(x.dtype) for a in (jnp.logical_not(finite), p != 0))
    lost = dot(wrong, some, 0, over_p) > 0
    return jnp.where(lost, jnp.nan, dot(jnp.where(finite, x, 0.0).astype(x.dtype), p, 0, over_p))


def check_launch(interpret: bool, *operands: Any) -> None:
    """Checks that kernels compiled by Triton can run here, on these arrays.

    Args:
      interpret: whether the kernel is interpreted.
      *operands: trees of the arrays that the kernel reads and writes.

    Raises:
      NotImplementedError: kernels are not for this GPU, or Pallas would get an array's offsets wrong.
    """
    if not interpret and jax.default_backend() == "gpu":  # elsewhere it is compiled ahead, for another machine
        check_gpu()
    for array in jax.tree.leaves(operands):
        # Pallas counts elements in 32 bits, with a sign, up to 2**32 bytes; above, in 64 bits.
        if array.size > 2**31 and array.size * array.dtype.itemsize <= 2**32:
            raise NotImplementedError(
                f"{array.size} bytes in an array; Pallas' offsets are wrong from 2**31 to 2**32"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A range of channels whose width is a power of two.

    It lies within one group, or it holds several whole groups, whose width is then a power of two as well.
    """

    start: int | Array
    width: int
    group: int | Array  # the first group
    groups: int

    def channels(self) -> Int32[Array, "width"]:
        return self.start + jnp.arange(self.width)


def piece_width(stored: GpuTensor, widest: int) -> int:
    """Returns the width of pieces of equal size, for a loop over them.

    Args:
      stored: the tensor.
      widest: the largest width allowed.

    Raises:
      NotImplementedError: the channels do not divide into pieces that a tensor core takes.
    """
    group = stored.channels // stored.groups
    size = stored.channels if power_of_two(group) else group
    width = min(size & -size, widest)
    if width < SMALLEST:
        raise NotImplementedError(f"{stored.channels} channels in groups of {group}: not in pieces of {SMALLEST}")
    return width


def piece_at(stored: GpuTensor, width: int, index: Array) -> Piece:
    """Returns piece `index` of pieces that are all `width` wide."""
    group = stored.channels // stored.groups
    return Piece(index * width, width, quotient(index * width, group), max(1, width // group))


def pieces(stored: GpuTensor, *, whole: bool) -> list[Piece]:
    """Splits the channels of a tensor into pieces.

    Args:
      stored: the tensor.
      whole: whether a piece may hold several groups; otherwise it lies within one.

    Raises:
      NotImplementedError: the channels do not divide into pieces that a tensor core takes.
    """
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


class SubTiles:
    """A packed tensor [S, D] of one head inside a kernel: sub-tiles of one block as floats.

    Bytes and scales are loaded once, even where several sub-tiles use them.

    Attributes:
      held: scales and zero points loaded so far, by what they are of.
    """

    def __init__(
        self,
        refs: Packed,
        stored: GpuTensor,
        cut: Cut,
        block: Array,
        interpret: bool,
        visible: tuple[Array, Array] | None = None,
        held: Mapping[tuple, Array] | None = None,
    ) -> None:
        """The sub-tiles of a block; where `visible` is given, tokens outside its range are never NaN.

        With `held`, that of another object for this block, scales are not loaded again.
        """
        self.refs, self.stored, self.cut, self.block, self.interpret = refs, stored, cut, block, interpret
        self.visible = visible
        self.held: dict[tuple, Array] = dict(held or {})
        self._bytes_held: dict[tuple, Array] = {}

    def values(self, tile: int, piece: Piece, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        """The values of an exact tensor."""
        return self._bytes(0, tile, piece).astype(dtype)

    def codes(self, tile: int, piece: Piece, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        """Codes plus `offset(dtype)`, exact in float32 and bfloat16."""
        if dtype == jnp.float32 or self.interpret:
            return (self._codes(tile, piece).astype(jnp.float32) + self.offset(dtype)).astype(dtype)
        return self._inline(tile, self._words(tile, piece), False, dtype)

    def offset(self, dtype: jnp.dtype) -> int:
        """The number that `codes` adds."""
        return self.stored.offset(dtype != jnp.float32)

    def dequantized(self, tile: int, piece: Piece, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        """codes * scale + zero in float32 or float16."""
        scale, zero = (self._spread(part, tile, piece) for part in ("scale", "zero"))
        if dtype == jnp.float32 or self.interpret:
            codes = self._codes(tile, piece).astype(jnp.float32)
            return (codes * scale.astype(jnp.float32) + zero.astype(jnp.float32)).astype(dtype)
        return self._inline(tile, [*self._words(tile, piece), scale, zero], True, dtype)

    def _inline(self, tile: int, args: list[Array], scaled: bool, dtype: jnp.dtype) -> Float[Array, "rows width"]:
        code, operands = self.stored.assembly(tile * self.cut.run, scaled), self.stored.operands(scaled)
        result = jax.ShapeDtypeStruct(args[0].shape, dtype)
        [out] = plgpu.elementwise_inline_asm(
            code, args=args, constraints=operands, pack=4, result_shape_dtypes=[result]
        )
        return out

    def token_scale(self, part: str, tile: int, group: int | Array) -> Float32[Array, "rows"]:
        """Scale or zero point (`part`) of one group of channels, per token."""
        at = self._within(self.cut.positions(self.block, tile), self.stored.tokens)
        return _once(self.held, (part, tile, group), lambda: getattr(self.refs, part)[group, at]).astype(jnp.float32)

    def token_scales(
        self, part: str, tile: int, piece: Piece, groups: int, each: int
    ) -> Float32[Array, "rows groups*each"]:
        """Scales or zero points (`part`) of the groups of a piece, per token.

        The last group is repeated up to `groups`; every entry then stands `each` times in a row.
        """
        scales = self._token_groups(part, tile, piece, groups).astype(jnp.float32)
        rows = self.cut.rows
        return jnp.broadcast_to(scales[:, :, None], (rows, groups, each)).reshape(rows, groups * each)

    def _token_groups(self, part: str, tile: int, piece: Piece, groups: int) -> Float16[Array, "rows groups"]:
        at = self._within(self.cut.positions(self.block, tile), self.stored.tokens)
        group = piece.group + jnp.minimum(jnp.arange(groups), piece.groups - 1)
        inside = self._inside(self.cut.positions(self.block, tile))
        load = lambda: _load(getattr(self.refs, part), (group[None, :], at[:, None]), inside)  # noqa: E731
        return _once(self.held, (part, tile, piece), load)

    def load_scales(self, tile: int, piece: Piece, groups: int) -> None:
        """Loads what `token_scales` (with so many groups) or `dequantized` need of a sub-tile and piece."""
        for part in ("scale", "zero"):
            if self.stored.per == "token":
                self._token_groups(part, tile, piece, groups)
            else:
                self._cells(part, tile, piece)

    def _spread(self, part: str, tile: int, piece: Piece) -> Float16[Array, "rows width"]:
        """Scales or zero points of every value."""
        rows = self.cut.rows
        if self.stored.per == "token":
            shape = (rows, piece.groups, piece.width // piece.groups)
            scales = self._token_groups(part, tile, piece, piece.groups)
            return jax.lax.broadcast_in_dim(scales, shape, (0, 1)).reshape(rows, piece.width)
        cell = self.stored.shared_tokens(self.cut.run)
        scales = self._cells(part, tile, piece)
        shape = (rows // cell, cell, piece.width)
        return jax.lax.broadcast_in_dim(scales, shape, (0, 2)).reshape(rows, piece.width)

    def _cells(self, part: str, tile: int, piece: Piece) -> Float16[Array, "cells width"]:
        """Scales or zero points of channels, a row for all tokens of a sub-tile that always share them."""
        span, run, group = self.cut.span, self.cut.run, self.stored.group
        cell = self.stored.shared_tokens(run)
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
        inside = self._inside(row * group, group)
        row = self._within(row, self.stored.tokens // group)
        load = lambda: _load(getattr(self.refs, part), (row[:, None], piece.channels()[None, :]), inside)  # noqa: E731
        return _once(self.held, (part, key, piece), load)

    def _words(self, tile: int, piece: Piece) -> list[UInt8[Array, "rows width"]]:
        """The bytes of a sub-tile in each plane."""
        return [self._bytes(plane, tile, piece) for plane in range(len(self.stored.widths))]

    def _codes(self, tile: int, piece: Piece) -> UInt8[Array, "rows width"]:
        parts, low = [], 0
        for plane, (width, word) in enumerate(zip(self.stored.widths, self._words(tile, piece), strict=True)):
            _, shift = self.stored.place(plane, tile * self.cut.run)
            parts.append(((word >> shift) & ((1 << width) - 1)) << low)
            low += width
        return functools.reduce(operator.or_, parts)

    def _bytes(self, plane: int, tile: int, piece: Piece) -> Array:
        """[rows, width] of a plane: bytes, or the values themselves where they are exact."""
        stored, width = self.stored, self.stored.widths[plane]
        first, _ = stored.place(plane, tile * self.cut.run)
        row = (
            self.cut.spans(self.block) * (self.cut.span * width // 8)
            + first
            + remainder(jnp.arange(self.cut.rows), self.cut.run)
        )
        row = self._within(row, stored.tokens * width // 8)
        inside = self._inside(self.cut.positions(self.block, tile)) if stored.exact else None  # codes are never NaN
        load = lambda: _load(self.refs.planes[plane], (row[:, None], piece.channels()[None, :]), inside)  # noqa: E731
        return _once(self._bytes_held, (plane, first, piece), load)

    def _inside(self, first: Int32[Array, "n"], count: int = 1) -> Bool[Array, "n"] | None:
        """Which of the runs of `count` tokens from `first` on have a visible one; None where it does not matter."""
        if self.visible is None:
            return None
        low, end = self.visible
        return (first + count > low) & (first < end)

    def _within(self, index: Int32[Array, "n"], size: int) -> Int32[Array, "n"]:
        """Clips an index to `size` where the last block may reach past the buffer."""
        return index if self.stored.tokens % self.cut.block == 0 else jnp.minimum(index, size - 1)


class Blocks:
    """The blocks of a packed tensor [S, D] of one head, for a loop that loads their scales a block ahead.

    Triton's copies into shared memory, which run ahead of the loop, move 4 bytes a thread or more; scales have 2.
    They go to registers, and the loop carries them to the next turn: loaded where they are used, each would be waited
    for.
    """

    def __init__(
        self,
        refs: Packed,
        stored: GpuTensor,
        cut: Cut,
        interpret: bool,
        visible: tuple[Array, Array] | None = None,
    ) -> None:
        """The blocks of a tensor; `visible` as in `SubTiles`."""
        self.refs, self.stored, self.cut, self.interpret, self.visible = refs, stored, cut, interpret, visible
        self.names: list[tuple] = []

    def at(self, block: Array, scales: list[Array]) -> SubTiles:
        """Returns a block with the scales that were loaded for it."""
        held = dict(zip(self.names, scales, strict=True))
        return SubTiles(self.refs, self.stored, self.cut, block, self.interpret, self.visible, held)

    def scales(self, block: Array, load: Callable[[SubTiles], None]) -> list[Array]:
        """Loads scales and zero points of a block; those of the last block for one past the end.

        Args:
          block: index of the block.
          load: asks a block for all that it will be asked for, always the same.
        """
        block = jnp.minimum(block, pl.cdiv(self.stored.tokens, self.cut.block) - 1)
        tiles = SubTiles(self.refs, self.stored, self.cut, block, self.interpret, self.visible)
        load(tiles)
        self.names = list(tiles.held)
        return list(tiles.held.values())


def _once(held: dict[tuple, Array], key: tuple, load: Callable[[], Array]) -> Array:
    if key not in held:
        held[key] = load()
    return held[key]


def _load(ref, at: tuple[Array, Array], inside: Bool[Array, "n"] | None) -> Array:
    """Loads from a ref; zeros for the rows that are not `inside`."""
    if inside is None:
        return ref[at]
    mask = jnp.broadcast_to(inside[:, None], jnp.broadcast_shapes(*(index.shape for index in at)))
    return plgpu.load(ref.at[at], mask=mask, other=0.0)


def heads_spec(array: Array) -> pl.BlockSpec:
    """Returns the spec that maps all of one head of [B, K, ...] to a program; the first grid axes are B and K."""
    rest = array.shape[2:]
    return pl.BlockSpec((None, None, *rest), lambda b, k, *_: (b, k, *[0] * len(rest)))
