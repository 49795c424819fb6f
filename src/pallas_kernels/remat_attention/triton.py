"""Rematerialising attention for GPUs, in Pallas through Triton.

There are two kernels, because registers do not hold both the keys and the weighted rows of wide rows. The first
rebuilds the keys of a block of tokens for one kv head and writes masked scores [B, H, S] with the maximum and sum of
each block; scores of blocks that no query sees are neither computed nor written. The second weights rows by the
probabilities, for all query heads at once, in tiles of the row's width. Scores cost 8 bytes of memory traffic per
query and token. Each kernel reads rows from memory once; the first reads them again from the L2 cache for every kv
head. The two halves of a head are rebuilt separately, so that RoPE needs no shuffle.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.gpu_layout import LIFT, LOG2_E, Cut, GpuTensor, blocks_of, cores, cut, quotient, span, splits_of
from pallas_kernels.layout import MASKED, Packed, by_kv_head, by_query
from pallas_kernels.remat_attention.weights import Rebuild
from pallas_kernels.triton_common import (
    Blocks,
    SubTiles,
    check_launch,
    dot,
    piece_at,
    piece_width,
    weighed,
)

MOST_ROWS = 16  # query rows of a kv head at most
MOST_COLUMNS = 64  # query rows of one program of the second kernel at most
TOKENS = 128  # of a block whose keys are rebuilt
DEPTH = 32  # channels of rows multiplied at a time; with more, registers spill on A100
RESIDENT = 2  # programs of the second kernel that a multiprocessor holds at least, by its registers
LEAST = 4  # blocks of a part of the second kernel at least: parts of its output are summed afterwards
STAGES = 3  # of loops: with 2, copies into shared memory are awaited as soon as they are issued
CARRIED = 16  # query rows of a program of the second kernel for which it carries scales; with 32, B200 spills 9 KB
WIDE = 128  # channels of a tile of weighted rows or of a reconstruction


@dataclasses.dataclass(frozen=True)
class RematPlan:
    """The static settings of the kernels, known when they are traced."""

    keys: GpuTensor
    values: GpuTensor
    key_cut: Cut
    value_cut: Cut
    tokens: int  # queries of a sequence
    ratio: int  # query heads of a kv head
    head_dim: int
    first: int
    window: int | None
    scale: float
    eps: float
    dtype: jnp.dtype  # of q
    splits: int
    columns: int  # query rows of a program of the second kernel
    width: int  # of a tile of values
    interpret: bool

    @property
    def rows(self) -> int:
        return self.tokens * self.ratio

    @property
    def padded(self) -> int:
        return _padded(self.rows)


def _padded(rows: int) -> int:
    """Rounds up to a number of columns that a tensor core takes."""
    return max(8, 1 << (rows - 1).bit_length())


def remat_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    rebuild: Rebuild,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float32[Array, "B T H s"], Float32[Array, "B T H"]]:
    """See `pallas_kernels.remat_attention`."""
    check_launch(interpret, q, keys, values)
    batch, tokens, heads, head_dim = q.shape
    kv_heads, groups, width = rebuild.kv_heads(head_dim), keys.shape[1], values.shape[3]
    ratio = heads // kv_heads
    if tokens * ratio > MOST_ROWS:
        raise NotImplementedError(f"{tokens} queries of {ratio} heads; at most {MOST_ROWS} rows a kv head")
    if head_dim % 2 or head_dim < 32:
        raise NotImplementedError(f"head_dim {head_dim}; expected an even one of at least 32")
    k, v = GpuTensor.of(keys), GpuTensor.of(values)
    key_cut, value_cut = _cut(k, TOKENS), _cut(v, TOKENS)
    columns = min(MOST_COLUMNS, _padded(kv_heads // groups * tokens * ratio))
    tile = piece_width(v, WIDE)
    programs = batch * groups * (width // tile) * pl.cdiv(kv_heads // groups * tokens * ratio, columns)
    splits = splits_of(programs, pl.cdiv(v.tokens, value_cut.block), cores() * RESIDENT, LEAST)
    plan = RematPlan(
        *(k, v, key_cut, value_cut, tokens, ratio, head_dim, first, window, scale, rebuild.eps, jnp.dtype(q.dtype)),
        *(splits, columns, tile, interpret),
    )
    start, stop = start.astype(jnp.int32), stop.astype(jnp.int32)
    scores, highest, total = _score(by_kv_head(q, kv_heads), keys, rebuild, start, stop, plan)
    peak = highest.max(2, keepdims=True)
    total = (total * jnp.exp2(highest - peak)).sum(2)
    seen = total != 0  # NaN counts as seen
    lse = jnp.where(seen, peak[:, :, 0] + jnp.log2(jnp.where(seen, total, 1.0)), 0.0)  # in base 2
    scores = scores.reshape(batch, groups, -1, k.tokens)
    output = _weigh_rows(scores, lse.reshape(batch, groups, -1), values, start, stop, plan)
    output = by_query(output.reshape(batch, kv_heads, -1, width), tokens)
    return output, by_query(jnp.where(seen, lse / LOG2_E, MASKED)[..., None], tokens)[..., 0]


def reconstruct(
    below: Float[Array, "B S M"],
    delta: Packed,
    up: Float[Array, "r M"],
    until: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S M"]:
    """See `pallas_kernels.remat_attention.reconstruct`.

    There is one program per block of tokens and tile of M; it returns at once where all positions are past `until`.
    """
    check_launch(interpret, below, delta)
    batch, _, channels = below.shape
    stored = GpuTensor.of(delta)
    own = _cut(stored, TOKENS)
    spec = pl.BlockSpec((None, *below.shape[1:]), lambda m, t, b: (b, 0, 0))
    return pl.pallas_call(
        functools.partial(_reconstruct_kernel, stored=stored, own=own, channels=channels, interpret=interpret),
        grid=(pl.cdiv(channels, WIDE), pl.cdiv(stored.tokens, own.block), batch),
        in_specs=[
            spec,
            jax.tree.map(lambda a: pl.BlockSpec((None, None, *a.shape[2:]), lambda m, t, b: (b, 0, 0, 0)), delta),
            pl.BlockSpec(up.shape, lambda m, t, b: (0, 0)),
            pl.BlockSpec((1,), lambda m, t, b: (b,)),
        ],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(below.shape, below.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=STAGES),
        interpret=interpret,
    )(below, delta, up, until.astype(jnp.int32))


def _cut(stored: GpuTensor, tokens: int) -> Cut:
    """Splits blocks of `tokens` tokens, or of more where packing needs it."""
    smallest = cut([stored], 0)
    return dataclasses.replace(smallest, repeats=max(smallest.repeats, tokens // smallest.span))


def _score(
    q: Float[Array, "B K R D"],
    keys: Packed,
    rebuild: Rebuild,
    start: Int32[Array, "B"],
    stop: Int32[Array, "B"],
    plan: RematPlan,
) -> tuple[Float32[Array, "B K R S"], Float32[Array, "B K N R"], Float32[Array, "B K N R"]]:
    """Returns masked scores in base 2, and the maximum and the sum of exponentials of each of N blocks."""
    batch, kv_heads, rows, head_dim = q.shape
    groups, blocks = keys.shape[1], pl.cdiv(plan.keys.tokens, plan.key_cut.block)
    group = lambda k: k if groups > 1 else 0  # noqa: E731
    column = lambda k: 0 if groups > 1 else k  # noqa: E731
    whole = lambda a: pl.BlockSpec(a.shape, lambda k, t, b: (0,) * a.ndim)  # noqa: E731
    # Kv heads first: those that read the same rows run side by side.
    part = pl.BlockSpec((None, None, None, rows), lambda k, t, b: (b, k, t, 0))
    scalar = pl.BlockSpec((1,), lambda k, t, b: (b,))
    tables = [a.astype(jnp.float32) for a in (rebuild.bias, rebuild.norm) if a is not None]
    return pl.pallas_call(
        functools.partial(
            _score_kernel, bias=rebuild.bias is not None, norm=rebuild.norm is not None, groups=groups, plan=plan
        ),
        grid=(kv_heads, blocks, batch),
        in_specs=[
            pl.BlockSpec((None, None, rows, head_dim), lambda k, t, b: (b, k, 0, 0)),
            scalar,
            scalar,
            jax.tree.map(
                lambda a: pl.BlockSpec((None, None, *a.shape[2:]), lambda k, t, b: (b, group(k), 0, 0)), keys
            ),
            pl.BlockSpec((None, rebuild.up.shape[1], head_dim), lambda k, t, b: (group(k), 0, column(k))),
            *[whole(a) for a in (rebuild.cos, rebuild.sin, *tables)],
        ],
        out_specs=[
            pl.BlockSpec((None, None, rows, plan.keys.tokens), lambda k, t, b: (b, k, 0, 0)),
            part,
            part,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, rows, plan.keys.tokens), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, blocks, rows), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, blocks, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=STAGES),
        interpret=plan.interpret,
    )(q, start, stop, keys, rebuild.up.astype(plan.dtype), rebuild.cos, rebuild.sin, *tables)


def _score_kernel(
    q_ref,
    start_ref,
    stop_ref,
    keys: Packed,
    up_ref,
    cos_ref,
    sin_ref,
    *refs,
    bias: bool,
    norm: bool,
    groups: int,
    plan: RematPlan,
) -> None:
    *tables, scores_ref, highest_ref, total_ref = refs
    start, stop = start_ref[0], stop_ref[0]
    head, block, row = pl.program_id(0), pl.program_id(1), jnp.arange(plan.padded)
    low, end = span(start, stop, plan.tokens, plan.first, plan.window)
    live = (block * plan.key_cut.block < end) & ((block + 1) * plan.key_cut.block > low)

    @pl.when(live)
    def _():
        rotation = cos_ref, sin_ref
        scores = _block_scores(head, block, q_ref, start, stop, keys, up_ref, rotation, tables, bias, norm, plan)
        for tile, each in enumerate(scores):
            at = plan.key_cut.positions(block, tile)
            to = scores_ref.at[row[None, :], at[:, None]]
            plgpu.store(to, each, mask=(row < plan.rows)[None, :] & (at < plan.keys.tokens)[:, None])
        highest = functools.reduce(jnp.maximum, scores).max(0)
        p = [jnp.where(s == MASKED, 0.0, jnp.exp2(s - highest[None, :])) for s in scores]
        plgpu.store(highest_ref.at[row], highest, mask=row < plan.rows)
        plgpu.store(total_ref.at[row], functools.reduce(jnp.add, p).sum(0), mask=row < plan.rows)

    @pl.when(jnp.logical_not(live))  # scores that nobody reads are not written
    def _():
        plgpu.store(highest_ref.at[row], jnp.full(row.shape, MASKED, jnp.float32), mask=row < plan.rows)
        plgpu.store(total_ref.at[row], jnp.zeros(row.shape, jnp.float32), mask=row < plan.rows)


def _block_scores(
    head: Array,
    block: Array,
    q_ref,
    start: Array,
    stop: Array,
    keys: Packed,
    up_ref,
    rotation,
    tables: Sequence[Any],
    bias: bool,
    norm: bool,
    plan: RematPlan,
) -> list[Float32[Array, "rows padded"]]:
    """Rebuilds the keys of a head and block; returns the masked scores of each sub-tile."""
    half = plan.head_dim // 2
    channel = jnp.arange(1 << (half - 1).bit_length())
    inside = channel < half
    halves = [channel, half + channel]
    made = _product(keys, plan.keys, plan.key_cut, block, up_ref, halves, inside, plan.dtype, plan.interpret)
    row = jnp.arange(plan.padded)
    query = start + quotient(row, plan.ratio)
    clipped = jnp.minimum(row, plan.rows - 1)
    mask = jnp.broadcast_to(inside[None, :], (plan.padded, channel.shape[0]))
    q = [plgpu.load(q_ref.at[clipped[:, None], c[None, :]], mask=mask, other=0.0) for c in halves]
    scores = []
    for tile, (lo, hi) in enumerate(made):
        at = plan.key_cut.positions(block, tile)
        if bias:
            lo, hi = (x + _row(tables[0].at[head, c], inside) for x, c in ((lo, halves[0]), (hi, halves[1])))
        if norm:
            size = jax.lax.rsqrt(((lo * lo).sum(1) + (hi * hi).sum(1)) / plan.head_dim + plan.eps)[:, None]
            lo, hi = (x * size * _row(tables[-1].at[c], inside) for x, c in ((lo, halves[0]), (hi, halves[1])))
        angle = (jnp.minimum(at, plan.keys.tokens - 1)[:, None], channel[None, :])
        known = jnp.broadcast_to(inside[None, :], lo.shape)
        cos, sin = (plgpu.load(a.at[angle], mask=known, other=0.0).astype(jnp.float32) for a in rotation)
        turned = (lo * cos - hi * sin).astype(plan.dtype), (hi * cos + lo * sin).astype(plan.dtype)
        raw = sum(dot(x, question, 1, 1) for x, question in zip(turned, q, strict=True)) * (plan.scale * LOG2_E)
        seen = (at[:, None] < jnp.minimum(query + 1, stop)[None, :]) & (at >= plan.first)[:, None]
        if plan.window is not None:
            seen &= at[:, None] > (query - plan.window)[None, :]
        scores.append(jnp.where(seen, raw, MASKED))
    return scores


def _weigh_rows(
    scores: Float32[Array, "B G R S"],
    lse: Float32[Array, "B G R"],
    values: Packed,
    start: Int32[Array, "B"],
    stop: Int32[Array, "B"],
    plan: RematPlan,
) -> Float32[Array, "B G R s"]:
    """Multiplies probabilities by rows, and sums over the splits of the tokens."""
    batch, groups, rows, _ = scores.shape
    tiles, chunks, width = plan.values.channels // plan.width, pl.cdiv(rows, plan.columns), plan.values.channels
    own = lambda *shape: pl.BlockSpec((None, None, *shape), lambda z, g, b: (b, g, *[0] * len(shape)))  # noqa: E731
    scalar = pl.BlockSpec((1,), lambda z, g, b: (b,))
    output = pl.pallas_call(
        functools.partial(_weigh_kernel, tiles=tiles, chunks=chunks, rows=rows, plan=plan),
        grid=(tiles * chunks * plan.splits, groups, batch),
        in_specs=[
            own(*scores.shape[2:]),
            own(rows),
            jax.tree.map(lambda a: own(*a.shape[2:]), values),
            scalar,
            scalar,
        ],
        out_specs=own(plan.splits, rows, width),
        out_shape=jax.ShapeDtypeStruct((batch, groups, plan.splits, rows, width), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=STAGES),
        interpret=plan.interpret,
    )(scores, lse, values, start, stop)
    return output.sum(2)


def _weigh_kernel(
    scores_ref,
    lse_ref,
    values: Packed,
    start_ref,
    stop_ref,
    output_ref,
    *,
    tiles: int,
    chunks: int,
    rows: int,
    plan: RematPlan,
) -> None:
    start, stop = start_ref[0], stop_ref[0]
    index = pl.program_id(0)
    tile_index, chunk, split = index % tiles, index // tiles % chunks, index // (tiles * chunks)
    visible = span(start, stop, plan.tokens, plan.first, plan.window)
    begin, end = blocks_of(*visible, plan.value_cut.block)
    each = pl.cdiv(jnp.maximum(end - begin, 0), plan.splits)
    begin += split * each
    end = jnp.minimum(begin + each, end)
    row = chunk * plan.columns + jnp.arange(plan.columns)
    lse = lse_ref[jnp.minimum(row, rows - 1)]
    piece = piece_at(plan.values, plan.width, tile_index)
    exact = plan.values.exact
    dtype = plan.dtype if exact or plan.dtype == jnp.float32 else jnp.dtype(jnp.float16)
    lift = LIFT if dtype == jnp.float16 else 1.0

    blocks = Blocks(values, plan.values, plan.value_cut, plan.interpret, visible)

    def load_scales(tiles: SubTiles) -> None:
        for tile in range(plan.value_cut.tiles) if not exact and plan.columns <= CARRIED else ():
            tiles.load_scales(tile, piece, piece.groups)

    def step(block, carry):
        answer, scales = carry
        stream, scales = blocks.at(block, scales), blocks.scales(block + 1, load_scales)
        for tile in range(plan.value_cut.tiles):
            at = plan.value_cut.positions(block, tile)
            known = (at >= visible[0]) & (at < visible[1])  # no other scores were written
            mask = (row < rows)[:, None] & known[None, :]
            scores = plgpu.load(scores_ref.at[row[:, None], at[None, :]], mask=mask, other=MASKED)
            p = (lift * jnp.exp2(scores - lse[:, None])).astype(dtype)
            x = (stream.values if exact else stream.dequantized)(tile, piece, dtype)
            answer += weighed(x, p, 1, plan.tokens > 1)
        return answer, scales

    empty = jnp.zeros((plan.width, plan.columns), jnp.float32), blocks.scales(begin, load_scales)
    answer = jax.lax.fori_loop(begin, end, step, empty)[0] * (1 / lift)
    mask = jnp.broadcast_to((row < rows)[None, :], answer.shape)
    plgpu.store(output_ref.at[split, row[None, :], piece.channels()[:, None]], answer, mask=mask)


def _reconstruct_kernel(
    below_ref,
    delta: Packed,
    up_ref,
    until_ref,
    out_ref,
    *,
    stored: GpuTensor,
    own: Cut,
    channels: int,
    interpret: bool,
) -> None:
    block, until = pl.program_id(1), until_ref[0]
    column = pl.program_id(0) * WIDE + jnp.arange(WIDE)

    @pl.when(block * own.block < until)
    def _():
        inside = column < channels
        dtype = jnp.dtype(jnp.float32 if up_ref.dtype == jnp.float32 else jnp.bfloat16)
        made = _product(delta, stored, own, block, up_ref, [column], inside, dtype, interpret)
        for tile, [step] in enumerate(made):
            at = own.positions(block, tile)
            mask = (at < until)[:, None] & inside[None, :]
            place = (at[:, None], column[None, :])
            old = plgpu.load(below_ref.at[place], mask=mask, other=0.0).astype(jnp.float32)
            plgpu.store(out_ref.at[place], (old + step).astype(out_ref.dtype), mask=mask)


def _product(
    refs: Packed,
    stored: GpuTensor,
    own: Cut,
    block: Array,
    up_ref,
    columns: list[Int32[Array, "c"]],
    inside: Bool[Array, "c"],
    dtype: jnp.dtype,
    interpret: bool,
) -> list[list[Float32[Array, "rows c"]]]:
    """Rows of each sub-tile times some columns of a matrix."""
    width = piece_width(stored, DEPTH)

    def step(index, sums):
        piece = piece_at(stored, width, index)
        stream = SubTiles(refs, stored, own, block, interpret)
        mask = jnp.broadcast_to(inside[None, :], (width, inside.shape[0]))
        at = piece.channels()[:, None]
        ups = [plgpu.load(up_ref.at[at, c[None, :]], mask=mask, other=0.0).astype(dtype) for c in columns]
        new = []
        for tile, parts in enumerate(sums):
            made = jnp.dtype(jnp.float32 if dtype == jnp.float32 else jnp.float16)
            x = (
                stream.values(tile, piece, dtype)
                if stored.exact
                else stream.dequantized(tile, piece, made).astype(dtype)
            )
            new.append([part + dot(x, up, 1, 0) for part, up in zip(parts, ups, strict=True)])
        return new

    zeros = [[jnp.zeros((own.rows, c.shape[0]), jnp.float32) for c in columns] for _ in range(own.tiles)]
    return jax.lax.fori_loop(0, stored.channels // width, step, zeros)


def _row(ref, inside: Bool[Array, "c"]) -> Float32[Array, "1 c"]:
    """Loads a vector over channels, 0 beyond them."""
    return plgpu.load(ref, mask=inside, other=0.0)[None, :]
