"""Quantisation and packing for GPUs, in Pallas through Triton.

The grid is (N, K, channels and rows). A program holds the runs of tokens that are packed into the same bytes, each
run as a separate tile, so that packing is shifts and ors of whole tiles. With groups per token, a program may take
only a few rows of every run. Division and rounding are PTX instructions: Triton's division is approximate, and Pallas
does not lower `round`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float16, Float32, Int32, UInt8

from pallas_kernels.gpu_layout import power_of_two
from pallas_kernels.layout import PLANES
from pallas_kernels.quantize_pack import least_squares
from pallas_kernels.triton_common import check_launch

MOST = 8192  # values of a program at most
WIDE = 128  # channels of a program, unless a group is wider
LARGEST = 65504.0  # the largest float16


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The static settings of a kernel, known when it is traced."""

    bits: int
    per: str
    group: int
    tokens: int
    channels: int
    width: int  # channels of a program; the last ones may lie beyond a group or the tensor
    step: int  # channels from one program to the next
    rows: int  # rows of each run in a program
    fit: str
    interpret: bool

    @property
    def run(self) -> int:
        return self.tokens * min(PLANES[self.bits]) // 8

    @property
    def tiles(self) -> int:
        return self.tokens // self.run


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
    if not power_of_two(tokens) or (per == "channel" and not power_of_two(group)):
        raise NotImplementedError(f"blocks of {tokens} tokens in groups of {group}; expected powers of two")
    check_launch(interpret, x)
    plan = _plan(bits, per, group, tokens, channels, fit, interpret)
    groups = (channels // group, tokens) if per == "token" else (tokens // group, channels)
    spec = lambda *shape: pl.BlockSpec((None, None, *shape), lambda n, k, *_: (n, k, 0, 0))  # noqa: E731
    planes = [(tokens * w // 8, channels) for w in PLANES[bits]]
    held = plan.rows * plan.tiles * plan.width
    *packed, scale, zero = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(blocks, heads, pl.cdiv(channels, plan.step) * (plan.run // plan.rows)),
        in_specs=[spec(tokens, channels), pl.BlockSpec((None, tokens), lambda n, k, _: (n, 0))],
        out_specs=[spec(*shape) for shape in [*planes, groups, groups]],
        out_shape=[
            *[jax.ShapeDtypeStruct((blocks, heads, *shape), jnp.uint8) for shape in planes],
            *[jax.ShapeDtypeStruct((blocks, heads, *groups), jnp.float16)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(8, held // 1024)), num_stages=1),
        interpret=interpret,
    )(x, counted)
    return tuple(packed), scale, zero


def _plan(bits: int, per: str, group: int, tokens: int, channels: int, fit: str, interpret: bool) -> PackPlan:
    run = tokens * min(PLANES[bits]) // 8
    if per == "channel":
        width = step = min(1 << (channels - 1).bit_length(), WIDE, max(16, MOST // tokens))
        return PackPlan(bits, per, group, tokens, channels, width, step, run, fit, interpret)
    step = group
    while power_of_two(group) and channels % (2 * step) == 0 and 2 * step <= WIDE:
        step *= 2
    width = 1 << (step - 1).bit_length()
    rows = max(1, min(run, MOST // (width * tokens // run)))
    return PackPlan(bits, per, group, tokens, channels, width, step, 1 << rows.bit_length() - 1, fit, interpret)


def _kernel(x_ref, counted_ref, *out_refs, plan: PackPlan) -> None:
    *plane_refs, scale_ref, zero_ref = out_refs
    parts = plan.run // plan.rows
    first = pl.program_id(2) // parts * plan.step
    column = first + jnp.arange(plan.width)
    inside = (jnp.arange(plan.width) < plan.step) & (column < plan.channels)
    row = pl.program_id(2) % parts * plan.rows + jnp.arange(plan.rows)
    x, counted = [], []
    for tile in range(plan.tiles):
        at = tile * plan.run + row
        mask = jnp.broadcast_to(inside[None, :], (plan.rows, plan.width))
        values = plgpu.load(x_ref.at[at[:, None], column[None, :]], mask=mask, other=0.0).astype(jnp.float32)
        x.append(values)
        counted.append(counted_ref[at][:, None] & mask)
    quantize = _per_token if plan.per == "token" else _per_channel
    codes = quantize(x, counted, row, first, column, inside, scale_ref, zero_ref, plan)
    low = 0
    for width, ref in zip(PLANES[plan.bits], plane_refs, strict=True):
        runs = plan.tokens * width // 8 // plan.run  # runs of the narrowest plane in one run of this plane
        for within in range(runs):
            kept = [(codes[j * runs + within] >> low) & ((1 << width) - 1) for j in range(8 // width)]
            packed = functools.reduce(operator.or_, (part << (j * width) for j, part in enumerate(kept)))
            at = ref.at[(within * plan.run + row)[:, None], column[None, :]]
            plgpu.store(at, packed.astype(jnp.uint8), mask=jnp.broadcast_to(inside[None, :], packed.shape))
        low += width


def _per_token(
    x, counted, row, first, column, inside, scale_ref, zero_ref, plan: PackPlan
) -> list[Int32[Array, "rows width"]]:
    """Returns the codes of each tile and stores scales and zero points."""
    groups = max(1, plan.step // plan.group)
    split = (plan.rows, groups, plan.width // groups)
    codes = []
    for tile, (values, valid) in enumerate(zip(x, counted, strict=True)):
        low, high = _bounds(values, valid)
        spread = lambda a, split=split: jnp.broadcast_to(a[:, :, None], split).reshape(values.shape)  # noqa: B023, E731
        total = lambda tiles, split=split: tiles[0].reshape(split).sum(2)  # noqa: E731
        scale, zero = _scales(low.reshape(split).min(2), high.reshape(split).max(2), plan)
        scale, zero = _fit([values], [valid], scale, zero, spread, total, plan)
        at = (first // plan.group + jnp.arange(groups)[None, :], (tile * plan.run + row)[:, None])
        scale_ref[at], zero_ref[at] = scale, zero
        codes.append(_codes(values, spread(scale), spread(zero), plan))
    return codes


def _per_channel(
    x, counted, row, first, column, inside, scale_ref, zero_ref, plan: PackPlan
) -> list[Int32[Array, "rows width"]]:
    """Like `_per_token`; a group is several tiles, or a tile holds several groups."""
    together = max(1, plan.group // plan.run)
    groups = max(1, plan.run // plan.group)
    split = (groups, plan.run // groups, plan.width)
    spread = lambda a: jnp.broadcast_to(a[:, None, :], split).reshape(plan.run, plan.width)  # noqa: E731
    total = lambda tiles: functools.reduce(operator.add, tiles).reshape(split).sum(1)  # noqa: E731
    codes = []
    for tile in range(0, plan.tiles, together):
        those = slice(tile, tile + together)
        bounds = [_bounds(*pair) for pair in zip(x[those], counted[those], strict=True)]
        low = functools.reduce(jnp.minimum, [low for low, _ in bounds]).reshape(split).min(1)
        high = functools.reduce(jnp.maximum, [high for _, high in bounds]).reshape(split).max(1)
        scale, zero = _scales(low, high, plan)
        scale, zero = _fit(x[those], counted[those], scale, zero, spread, total, plan)
        at = (tile * plan.run // plan.group + jnp.arange(groups)[:, None], column[None, :])
        for ref, part in ((scale_ref, scale), (zero_ref, zero)):
            plgpu.store(ref.at[at], part, mask=jnp.broadcast_to(inside[None, :], part.shape))
        codes += [_codes(values, spread(scale), spread(zero), plan) for values in x[those]]
    return codes


def _bounds(
    values: Float32[Array, "rows width"], valid: Bool[Array, "rows width"]
) -> tuple[Float32[Array, "rows width"], Float32[Array, "rows width"]]:
    """Candidates for minimum and maximum.

    Triton's minima skip NaN, so it becomes infinity, which does not fit float16 either.
    """
    values = jnp.where(values == values, values, jnp.inf)
    return jnp.where(valid, values, jnp.inf), jnp.where(valid, values, -jnp.inf)


def _scales(low: Float32[Array, "*s"], high: Float32[Array, "*s"], plan: PackPlan) -> tuple[Array, Array]:
    """Scale and zero point, in float16, of groups with minimum `low` and maximum `high`."""
    empty = low > high
    low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)
    levels = jnp.full(low.shape, 2.0**plan.bits - 1, jnp.float32)
    scale, zero = _divide(high - low, levels, plan).astype(jnp.float16), low.astype(jnp.float16)
    finite = (jnp.abs(scale.astype(jnp.float32)) <= LARGEST) & (jnp.abs(zero.astype(jnp.float32)) <= LARGEST)
    none = jnp.full(scale.shape, jnp.nan, scale.dtype)
    return jnp.where(finite, scale, none), jnp.where(finite, zero, none)


def _fit(
    x: Sequence[Float32[Array, "rows width"]],
    counted: Sequence[Bool[Array, "rows width"]],
    scale: Float16[Array, "*s"],
    zero: Float16[Array, "*s"],
    spread: Callable[[Array], Array],
    total: Callable[[Sequence[Array]], Array],
    plan: PackPlan,
) -> tuple[Float16[Array, "*s"], Float16[Array, "*s"]]:
    """The scale and zero point that `plan.fit` asks for, of groups that lie in some tiles.

    `spread` gives every entry of a tile what is its group's; `total` sums entries of all tiles group by group.
    """
    if plan.fit == "minmax":
        return scale, zero
    levels, divide, rounded = (2.0**plan.bits - 1, *(functools.partial(f, plan=plan) for f in (_divide, _rounded)))

    def sums(s: Array, z: Array) -> least_squares.Sums:
        s, z = spread(s), spread(z)
        tiles = [
            least_squares.entries(values, valid, s, z, levels, plan.group, divide, rounded)
            for values, valid in zip(x, counted, strict=True)
        ]
        return least_squares.Sums(*(total(each) for each in zip(*tiles, strict=True)))

    narrow = lambda a: a.astype(jnp.float16).astype(jnp.float32)  # noqa: E731
    given = scale.astype(jnp.float32), zero.astype(jnp.float32)
    count = total([jnp.where(valid, 1.0, 0.0) for valid in counted])
    stored = lambda s, z: (narrow(s), narrow(z))  # noqa: E731
    s, z = least_squares.search(sums, *given, count, levels, plan.group, divide, stored)
    return s.astype(jnp.float16), z.astype(jnp.float16)


def _codes(
    values: Float32[Array, "rows width"],
    scale: Float16[Array, "rows width"],
    zero: Float16[Array, "rows width"],
    plan: PackPlan,
) -> Int32[Array, "rows width"]:
    scale, zero = scale.astype(jnp.float32), zero.astype(jnp.float32)
    codes = _divide(values - zero, jnp.where(scale == 0, 1.0, scale), plan)
    above = (codes >= 0) & (scale != 0)  # false for NaN
    codes = jnp.where(above, jnp.minimum(codes, 2.0**plan.bits - 1), 0.0)
    return _rounded(codes, plan).astype(jnp.int32)


def _rounded(x: Float32[Array, "*s"], plan: PackPlan) -> Float32[Array, "*s"]:
    """The nearest whole number, half to even."""
    if plan.interpret:
        return jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return _instruction("cvt.rni.f32.f32 $0, $1;", x)


def _divide(x: Float32[Array, "*s"], y: Float32[Array, "*s"], plan: PackPlan) -> Float32[Array, "*s"]:
    """The true quotient. In the interpreter, XLA would multiply by the reciprocal of a broadcast value."""
    if plan.interpret:
        return x / jax.lax.optimization_barrier(y)
    return _instruction("div.rn.f32 $0, $1, $2;", x, y)


def _instruction(code: str, *args: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    constraints = ",".join(["=f", *["f"] * len(args)])
    result = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    [out] = plgpu.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=1, result_shape_dtypes=[result]
    )
    return out
