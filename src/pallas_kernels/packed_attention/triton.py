"""Packed attention for GPUs, in Pallas through Triton.

The grid is (B, K, splits). Every program walks over a share of a sequence's blocks and writes an output and a
log-sum-exp; these merge exactly afterwards. In both products tokens are rows and queries are columns, padded to 8, so
that few queries waste little of a tensor core. Where a token has few groups, scales multiply scores and probabilities
instead of codes. Otherwise (scales per channel, many groups) values are dequantised in registers, in float16, which
holds any code and scale.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.gpu_layout import LIFT, LOG2_E, GpuTensor, blocks_of, quotient, remainder, span
from pallas_kernels.layout import MASKED, Attended, Packed, by_kv_head, in_launches
from pallas_kernels.packed_attention import gpu
from pallas_kernels.packed_attention.gpu import LOWEST
from pallas_kernels.triton_common import (
    Blocks,
    Piece,
    SubTiles,
    check_launch,
    dot,
    heads_spec,
    pieces,
    weighed,
)
from pallas_kernels.tuning import attention_class, lookup

MOST_FOLDED = 2  # groups of a token at most, for scales to multiply scores
LIGHT = 3  # programs on a multiprocessor, of codes in one plane with one scale a token: counted in compiled kernels
MOST_STACKED = 64  # columns of probabilities times scales at most


class TritonPlan(gpu.AttentionPlan):
    """The static settings of the kernel, known when it is traced."""

    def stacked(self, piece: Piece) -> int:
        """Columns of probabilities times scales, group after group."""
        return max(self.columns, piece.groups * self.distinct)

    @property
    def folds_keys(self) -> bool:
        keys = self.keys
        return not keys.exact and keys.per == "token" and keys.groups <= MOST_FOLDED and keys.group >= 16

    def folds_values(self, piece: Piece) -> bool:
        values = self.values
        return not values.exact and values.per == "token" and self.stacked(piece) <= MOST_STACKED

    def value_groups(self, piece: Piece) -> int:
        """How many scales of a token and piece are loaded."""
        return self.stacked(piece) // self.distinct if self.folds_values(piece) else piece.groups

    def load_key_scales(self, keys: SubTiles) -> None:
        """Loads all that `Questions.scores` needs besides codes."""
        for tile, piece in () if self.keys.exact else itertools.product(range(self.cut.tiles), self.key_pieces):
            if self.folds_keys:
                keys.token_scale("scale", tile, piece.group)
                keys.token_scale("zero", tile, piece.group)
            else:
                keys.load_scales(tile, piece, piece.groups)

    def load_value_scales(self, values: SubTiles) -> None:
        """Loads all that `_weigh` needs besides codes."""
        for tile, piece in () if self.values.exact else itertools.product(range(self.cut.tiles), self.value_pieces):
            values.load_scales(tile, piece, self.value_groups(piece))

    @functools.cached_property  # pieces are told apart by identity
    def key_pieces(self) -> list[Piece]:
        return pieces(self.keys, whole=not self.folds_keys)

    @functools.cached_property
    def value_pieces(self) -> list[Piece]:
        return pieces(self.values, whole=True)

    @property
    def made(self) -> jnp.dtype:
        """The dtype of values dequantised in registers."""
        return jnp.dtype(jnp.float16 if self.light else jnp.float32)


def packed_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool = False,
    block: int | None = None,
    splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Attended:
    """See `pallas_kernels.packed_attention`.

    Where block, splits, num_warps or num_stages is None, the value measured for this device is taken, or that of
    `defaults`.
    """
    check_launch(interpret, q, keys, values)
    settings = {"block": block, "splits": splits, "num_warps": num_warps, "num_stages": num_stages}
    given = {name: value for name, value in settings.items() if value is not None}

    def launch(q: Array, start: Array) -> Attended:
        tuned = {}
        if len(given) < len(settings):
            tuned = defaults(q, keys, values) | lookup("packed_attention", attention_class(q.shape, keys, values))
        chosen = tuned | given
        plan, how = gpu.plan_of(TritonPlan, q, keys, values, first, window, scale, interpret, chosen)
        return _launch(plan, how, q, keys, values, start, stop, gpu.share_of(plan, chosen["splits"], start, stop))

    return in_launches(launch, q, start, keys.shape[1], rows=gpu.LAUNCH_ROWS, most=gpu.MOST_ROWS)


def _launch(
    plan: TritonPlan,
    launch: dict[str, int],
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    each: Int32[Array, "1"],
) -> Attended:
    """Attends for as many queries as one launch takes, in parts of `each` blocks."""
    batch, kv_heads, parts = q.shape[0], keys.shape[1], plan.parts
    rows, width = by_kv_head(q, kv_heads), values.shape[3]
    own = lambda b, k, i: (b, k, i, 0, 0)  # noqa: E731
    output, lse = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(batch, kv_heads, parts),
        in_specs=[
            heads_spec(rows),
            pl.BlockSpec((1,), lambda b, k, i: (b,)),
            pl.BlockSpec((1,), lambda b, k, i: (b,)),
            pl.BlockSpec((1,), lambda b, k, i: (0,)),
            jax.tree.map(heads_spec, keys),
            jax.tree.map(heads_spec, values),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, plan.rows, width), own),
            pl.BlockSpec((None, None, None, plan.rows), lambda b, k, i: (b, k, i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, parts, plan.rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, plan.rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(**launch),
        interpret=plan.interpret,
    )(rows, start.astype(jnp.int32), stop.astype(jnp.int32), each, keys, values)
    return gpu.result(output, lse, q.shape[1])


def defaults(q: Float[Array, "B T H D"], keys: Packed, values: Packed) -> dict[str, int]:
    """Chooses block, splits, warps and stages.

    With sub-tiles of 64 tokens, each of four warps has separate rows. Sub-tiles have fewer tokens where registers
    would spill: for float32, and for codes of 1 bit (a block then has eight sub-tiles) beside exact values.

    Args:
      q: queries.
      keys: packed keys.
      values: packed values.

    Returns:
      The settings by name.
    """
    stored = GpuTensor.of(keys), GpuTensor.of(values)
    crowded = any(s.exact for s in stored) and min(width for s in stored for width in s.widths) == 1
    rows = 16 if q.dtype != jnp.bfloat16 else 32 if crowded else 64
    light = all(not s.exact and s.per == "token" and s.groups == len(s.widths) == 1 for s in stored)
    return gpu.settings_of(q, keys, values, rows, buffers=2, resident=LIGHT if light else gpu.RESIDENT)


def _kernel(
    q_ref, start_ref, stop_ref, each_ref, keys: Packed, values: Packed, output_ref, lse_ref, *, plan: TritonPlan
) -> None:
    start, stop, each = start_ref[0], stop_ref[0], each_ref[0]
    visible = span(start, stop, plan.tokens, plan.first, plan.window)
    begin, end = blocks_of(*visible, plan.cut.block)
    begin += pl.program_id(2) * each
    row = jnp.arange(plan.columns)

    @pl.when(begin < end)
    def _() -> None:
        own = begin, jnp.minimum(begin + each, end)
        _attend(q_ref, start, stop, visible, own, keys, values, output_ref, lse_ref, plan)

    @pl.when(begin >= end)
    def _() -> None:  # a part beyond the last of a shorter sequence
        plgpu.store(lse_ref.at[row], jnp.full(row.shape, MASKED, jnp.float32), mask=row < plan.rows)
        for piece in plan.value_pieces:
            at = output_ref.at[row[None, :], piece.channels()[:, None]]
            shape = piece.width, plan.columns
            plgpu.store(at, jnp.zeros(shape, jnp.float32), mask=jnp.broadcast_to((row < plan.rows)[None, :], shape))


def _attend(
    q_ref,
    start: Array,
    stop: Array,
    visible: tuple[Array, Array],
    own: tuple[Array, Array],
    keys: Packed,
    values: Packed,
    output_ref,
    lse_ref,
    plan: TritonPlan,
) -> None:
    """Attends to the range of blocks `own`, of a sequence whose range of positions is `visible`."""
    begin, end = own
    row = jnp.arange(plan.columns)
    query = start + quotient(remainder(row, plan.distinct), plan.ratio)  # positions
    questions = Questions(q_ref, plan)
    key_blocks = Blocks(keys, plan.keys, plan.cut, plan.interpret)
    value_blocks = Blocks(values, plan.values, plan.cut, plan.interpret, visible)
    scales_of = lambda block: (  # noqa: E731
        key_blocks.scales(block, plan.load_key_scales),
        value_blocks.scales(block, plan.load_value_scales),
    )

    def step(block, carry):
        highest, total, answers, scales = carry
        k, v = key_blocks.at(block, scales[0]), value_blocks.at(block, scales[1])
        scales = scales_of(block + 1)
        scores = [_masked(questions.scores(k, tile), k, tile, query, stop, plan) for tile in range(plan.cut.tiles)]
        new = jnp.maximum(highest, functools.reduce(jnp.maximum, scores).max(0))
        fade = jnp.exp2(highest - new)
        p = [jnp.exp2(s - new[None, :]) for s in scores]
        total = total * fade[None, :] + _sum(p)
        answers = [_weigh(a, fade, p, v, piece, plan) for a, piece in zip(answers, plan.value_pieces, strict=True)]
        return new, total, answers, scales

    empty = (
        jnp.full((plan.columns,), LOWEST, jnp.float32),
        jnp.zeros((plan.cut.rows, plan.columns), jnp.float32),
        [_no_answer(piece, plan) for piece in plan.value_pieces],
        scales_of(begin),
    )
    highest, total, answers, _ = jax.lax.fori_loop(begin, end, step, empty)
    total = total.sum(0)
    seen = total != 0  # NaN counts as seen
    lse = jnp.where(seen, highest * (1 / LOG2_E) + jnp.log(jnp.where(seen, total, 1.0)), MASKED)
    plgpu.store(lse_ref.at[row], lse, mask=row < plan.rows)
    inverse = jnp.where(seen, 1.0, 0.0) / jnp.where(seen, total, 1.0)
    for answer, piece in zip(answers, plan.value_pieces, strict=True):
        out = _settled(answer, piece, plan) * inverse[None, :]
        at = output_ref.at[row[None, :], piece.channels()[:, None]]
        plgpu.store(at, out, mask=jnp.broadcast_to((row < plan.rows)[None, :], out.shape))


class Questions:
    """The queries of a kv head in registers, in the form that the keys need."""

    def __init__(self, q_ref, plan: TritonPlan) -> None:
        row = jnp.minimum(remainder(jnp.arange(plan.columns), plan.distinct), plan.rows - 1)
        self.plan = plan
        self.factor: float | Array = plan.scale * LOG2_E
        self.q = {p: q_ref[row[:, None], p.channels()[None, :]] for p in plan.key_pieces}
        if plan.folds_keys:
            self.sums = {p: q.astype(jnp.float32).sum(1) for p, q in self.q.items()}
        elif not plan.keys.exact and plan.made == jnp.float16:
            # bfloat16 has a wider range than float16: each row is divided by a power of two, which is exact.
            largest = functools.reduce(jnp.maximum, [jnp.abs(q.astype(jnp.float32)).max(1) for q in self.q.values()])
            bits = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
            bits = jnp.clip(bits, 1 << 23, 253 << 23)
            size, inverse = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in (bits, (254 << 23) - bits))
            self.q = {p: (q.astype(jnp.float32) * inverse[:, None]).astype(jnp.float16) for p, q in self.q.items()}
            self.factor *= size[None, :]

    def scores(self, keys: SubTiles, tile: int) -> Float32[Array, "rows columns"]:
        """Scores of a sub-tile, in base 2."""
        if not self.plan.folds_keys:
            make = keys.values if self.plan.keys.exact else keys.dequantized
            return _sum(dot(make(tile, p, q.dtype), q, 1, 1) for p, q in self.q.items()) * self.factor
        parts, dtype = [], self.plan.dtype
        for group in dict.fromkeys(piece.group for piece in self.q):
            own = [piece for piece in self.q if piece.group == group]
            raw = _sum(dot(keys.codes(tile, p, dtype), self.q[p], 1, 1) for p in own)
            scale = keys.token_scale("scale", tile, group) * self.factor
            zero = keys.token_scale("zero", tile, group) * self.factor - scale * keys.offset(dtype)
            parts.append(raw * scale[:, None] + _sum(self.sums[p] for p in own)[None, :] * zero[:, None])
        return _sum(parts)


def _masked(
    scores: Float32[Array, "rows columns"],
    keys: SubTiles,
    tile: int,
    query: Int[Array, "columns"],
    stop: Array,
    plan: TritonPlan,
) -> Float32[Array, "rows columns"]:
    at = plan.cut.positions(keys.block, tile)[:, None]
    query = query[None, :]
    seen = at < jnp.minimum(query + 1, stop)
    if plan.first:
        seen &= at >= plan.first
    if plan.window is not None:
        seen &= at > query - plan.window
    return jnp.where(seen, scores, MASKED)


def _no_answer(
    piece: Piece, plan: TritonPlan
) -> tuple[Float32[Array, "width stacked"], Float32[Array, "rows stacked"]]:
    """Initial sums of probability times code, and of what offsets and zero points add to them, still per token."""
    folds = plan.folds_values(piece)
    columns, rows = (plan.stacked(piece), plan.cut.rows) if folds else (plan.columns, 1)
    return jnp.zeros((piece.width, columns), jnp.float32), jnp.zeros((rows, columns), jnp.float32)


def _weigh(answer, fade: Float32[Array, "columns"], p: list[Array], values: SubTiles, piece: Piece, plan: TritonPlan):
    """Adds one block to an answer; p has probabilities [rows, columns] of each sub-tile."""
    answer, zeros = answer
    if not plan.folds_values(piece):
        dtype = plan.dtype if plan.values.exact else plan.made
        make = values.values if plan.values.exact else values.dequantized
        lift = LIFT if dtype == jnp.float16 else 1.0
        several = plan.tokens > 1
        parts = [weighed(make(tile, piece, dtype), (lift * x).astype(dtype), 0, several) for tile, x in enumerate(p)]
        return answer * fade[None, :] + _sum(parts), zeros
    stacked = plan.stacked(piece)
    fade = _repeat(fade[None, :], stacked)
    answer, zeros = answer * fade, zeros * fade
    for tile, x in enumerate(p):
        scale, zero = (
            values.token_scales(part, tile, piece, plan.value_groups(piece), plan.distinct)
            for part in ("scale", "zero")
        )
        x = _repeat(x, stacked)
        scale, zero = (jnp.where(x != 0, a, 0.0) for a in (scale, zero))  # 0 times NaN is NaN
        weights = (x * scale).astype(plan.dtype)
        zeros += x * zero - values.offset(plan.dtype) * weights.astype(jnp.float32)
        answer += dot(values.codes(tile, piece, plan.dtype), weights, 0, 0)
    return answer, zeros


def _repeat(x: Float32[Array, "rows columns"], columns: int) -> Float32[Array, "rows {columns}"]:
    rows, own = x.shape
    return (
        x if own == columns else jnp.broadcast_to(x[:, None, :], (rows, columns // own, own)).reshape(rows, columns)
    )


def _settled(answer, piece: Piece, plan: TritonPlan) -> Float32[Array, "width columns"]:
    """The sums of probability times value; each channel takes the sums of its group."""
    answer, zeros = answer
    if not plan.folds_values(piece):
        return answer * (1 / LIFT) if not plan.values.exact and plan.made == jnp.float16 else answer
    answer = answer + zeros.sum(0)[None, :]
    if piece.groups == 1:
        return answer
    column, channel = jnp.arange(plan.stacked(piece))[None, :], jnp.arange(piece.width)[:, None]
    answer = jnp.where(quotient(column, plan.distinct) == quotient(channel, piece.width // piece.groups), answer, 0.0)
    answer = answer.reshape(piece.width, -1, plan.distinct).sum(1)
    return _repeat(answer, plan.columns)


def _sum(parts: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, parts)
