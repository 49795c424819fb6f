"""Packed attention on TPU: the pipeline fetches blocks of bytes, which are unpacked in registers.

Scales never multiply a tile of codes. They are folded into smaller arrays: into scores and probabilities where scales
are per token, into queries and outputs where they are per channel. Several groups are stacked as rows of one product,
which a few queries would leave nearly empty, and each group reads a separate part of the result.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels import mosaic_tpu_common as common
from pallas_kernels.layout import EXACT, MASKED, Attended, Packed, by_kv_head, by_query, in_launches
from pallas_kernels.mosaic_tpu_common import LANES, PackedRefs

LAUNCH_ROWS = 16  # query rows of a kv head: with 128, 2 bits and scales per channel do not fit the VMEM of v4
CHUNK = 512  # tokens computed at a time


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
    chunk: int = CHUNK,
) -> Attended:
    """See `pallas_kernels.packed_attention`.

    `block` is the number of tokens fetched at a time (None: what fits VMEM), `chunk` the number computed at a time.
    Both are rounded to what the packing needs.
    """
    launch = functools.partial(
        _launch,
        keys,
        values,
        stop,
        first=first,
        window=window,
        scale=scale,
        interpret=interpret,
        block=block,
        chunk=chunk,
    )
    return in_launches(launch, q, start, keys.shape[1], rows=LAUNCH_ROWS, most=LAUNCH_ROWS)


def _launch(
    keys: Packed,
    values: Packed,
    stop: Int[Array, "B"],
    q: Float[Array, "B T H D"],
    start: Int[Array, "B"],
    *,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool,
    block: int | None,
    chunk: int,
) -> Attended:
    """Attends for as many queries as one launch takes."""
    batch, queries, heads, channels = q.shape
    _, kv_heads, tokens, width = values.shape
    ratio = heads // kv_heads
    rows = queries * ratio
    padded = -(-rows // 8) * 8
    hold = common.heads_of(keys, values)
    chunk = common.chunk_of(keys, values, least=chunk)
    block = common.block_of(keys, values, heads=hold, chunk=chunk, block=block)
    bounds = common.bounds_of(start, stop, queries, first, window)
    q = jnp.pad(by_kv_head(q, kv_heads), ((0, 0), (0, 0), (0, padded - rows), (0, 0)))

    def stored(b, k, i, bounds):
        return b, k, common.block_at(bounds, b, i, tokens, block)

    def per_head(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, hold, padded, columns), lambda b, k, i, bounds: (b, k, 0, 0))

    kernel = functools.partial(
        _kernel,
        keys,
        values,
        queries=queries,
        ratio=ratio,
        first=first,
        window=window,
        scale=scale,
        block=block,
        chunk=chunk,
    )
    output, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads // hold, common.steps_of(tokens, queries, first, window, block)),
            in_specs=[
                per_head(channels),
                common.stream_specs(keys, hold, block, stored),
                common.stream_specs(values, hold, block, stored),
            ],
            out_specs=[per_head(width), per_head(1)],
            scratch_shapes=[
                *(pltpu.VMEM((hold, padded, columns), jnp.float32) for columns in (1, 1, width)),
                common.scale_scratch(keys, hold, block),
                common.scale_scratch(values, hold, block),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, padded, n), jnp.float32) for n in (width, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="packed_attention",
    )(bounds, q, common.stream(keys), common.stream(values))
    output, lse = (by_query(a[:, :, :rows], queries) for a in (output, lse))
    return output, lse[..., 0]


def _kernel(
    keys: Packed,
    values: Packed,
    bounds,
    q_ref,
    k_refs: PackedRefs,
    v_refs: PackedRefs,
    out_ref,
    lse_ref,
    top_ref,
    sum_ref,
    acc_ref,
    k_scales,
    v_scales,
    *,
    queries: int,
    ratio: int,
    first: int,
    window: int | None,
    scale: float,
    block: int,
    chunk: int,
) -> None:
    sequence, step = pl.program_id(0), pl.program_id(2)
    low, high = bounds[2, sequence], bounds[3, sequence]
    base = (common.quotient(low, block) + step) * block

    @pl.when(step == 0)
    def _():
        common.reset(top_ref, sum_ref, acc_ref)

    @pl.when(base < high)
    def _():
        common.widen_scales(keys, k_refs, k_scales)
        common.widen_scales(values, v_refs, v_scales)
        edges = common.edges_of(q_ref.shape[1], ratio, bounds, sequence, first, window)
        chunks = common.chunks_of(base, low, high, block, chunk)

        def head(h, _):
            q = q_ref[h]
            score = _scorer(keys, q, *common.of_head(keys, h, k_refs, k_scales))
            planes, scales = common.of_head(values, h, v_refs, v_scales)

            def body(i, state):
                at = pl.multiple_of(i * chunk, chunk)
                seen = common.seen(edges, base + at, chunk)
                scores = jnp.where(seen, score(at, chunk) * scale, MASKED)
                top, p, faded = common.soften(scores, seen, state[0])
                used = low - base, high - base
                added = weigh(values, p, seen, planes, scales, at, used, q.dtype, several=queries > 1)
                return top, state[1] * faded + p.sum(1, keepdims=True), state[2] * faded + added

            state = jax.lax.fori_loop(*chunks, body, (top_ref[h], sum_ref[h], acc_ref[h]))
            top_ref[h], sum_ref[h], acc_ref[h] = state

        jax.lax.fori_loop(0, q_ref.shape[0], head, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...], lse_ref[...] = common.finish(top_ref, sum_ref, acc_ref)


def _scorer(keys: Packed, q: Float[Array, "M D"], planes, scales):
    """Returns a function of a position in the block and a count that computes unscaled scores [M, count]."""
    if keys.bits == EXACT:
        return lambda at, count: common.dot(q, common.read(keys, planes, at, count, q.dtype), transposed=True)
    wide = q.astype(jnp.float32)
    if keys.per == "channel":
        return functools.partial(_score_channels, keys, wide, q.dtype, planes, scales)
    parts = [jnp.where(own, wide, 0.0) for own in _groups(keys, q.shape)]
    stacked = jnp.concatenate(parts).astype(q.dtype)
    return functools.partial(
        _score_tokens, keys, stacked, [part.sum(1, keepdims=True) for part in parts], planes, scales
    )


def _groups(packed: Packed, shape: tuple[int, ...]) -> list[Bool[Array, "M D"]]:
    """Which channels belong to each group of a token."""
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    starts = range(0, shape[1], packed.group)
    return [(channel >= start) & (channel < start + packed.group) for start in starts]


def _score_tokens(
    keys: Packed, q: Float[Array, "GM D"], sums: list[Float32[Array, "M 1"]], planes, scales, at, count: int
) -> Float32[Array, "M N"]:
    """sum over groups g of scale_g * (q_g . codes) + zero_g * sum(q_g)."""
    raw = common.dot(q, common.read(keys, planes, at, count, q.dtype), transposed=True)
    raw = raw.reshape(len(sums), -1, count)
    scale, zero = (ref[:, pl.ds(at, count)] for ref in scales)
    return sum(raw[g] * scale[g : g + 1] + total * zero[g : g + 1] for g, total in enumerate(sums))


def _score_channels(
    keys: Packed, q: Float32[Array, "M D"], dtype, planes, scales, at, count: int
) -> Float32[Array, "M N"]:
    """(q * scale) . codes + q . zero for each group of tokens; all groups within 128 tokens share one product."""
    codes, shared, lane = common.read(keys, planes, at, count, dtype), *_token_groups(keys, q.shape[0])
    tiles = []
    for tile in range(0, count, LANES):
        rows = [
            [ref[pl.ds(common.quotient(at + tile, keys.group) + u, 1), :] for ref in scales] for u in range(shared)
        ]
        folded = jnp.concatenate([q * scale for scale, _ in rows]).astype(dtype)
        raw = common.dot(folded, codes[tile : tile + LANES], transposed=True).reshape(shared, -1, LANES)
        parts = [raw[u] + (q * zero).sum(1, keepdims=True) for u, (_, zero) in enumerate(rows)]
        tiles.append(functools.reduce(lambda a, u: jnp.where(lane == u, parts[u], a), range(1, shared), parts[0]))
    return jnp.concatenate(tiles, 1)


def _token_groups(packed: Packed, rows: int) -> tuple[int, Int32[Array, "M 128"]]:
    """Returns the number of groups within 128 tokens, and the group of each of these tokens."""
    size = min(packed.group, LANES)  # a power of two
    return LANES // size, jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) >> (size.bit_length() - 1)


def weigh(
    values: Packed,
    p: Float32[Array, "M N"],
    seen: Bool[Array, "M N"],
    planes,
    scales,
    at: Int32[Array, ""],
    edges: tuple[Int32[Array, ""], Int32[Array, ""]],
    dtype,
    several: bool,
) -> Float32[Array, "M D"]:
    """Computes p @ values for tokens of a block.

    Args:
      values: packed values.
      p: probabilities of N tokens.
      seen: which of them each row sees.
      planes: refs of the planes of one head.
      scales: refs of its scales and zero points in float32.
      at: the first token within the block.
      edges: the range of tokens that are used; those outside may be NaN.
      dtype: dtype of the product.
      several: whether rows see different tokens.

    Returns:
      The weighted sums.
    """
    count = p.shape[1]
    tiles = common.read(values, planes, at, count, dtype)
    if values.bits == EXACT:
        token = at + jax.lax.broadcasted_iota(jnp.int32, tiles.shape, 0)
        return common.weighed(p, jnp.where((token >= edges[0]) & (token < edges[1]), tiles, 0), several)
    if values.per == "channel":
        return _weigh_channels(values, p, tiles, scales, at)
    scale, zero = (ref[:, pl.ds(at, count)] for ref in scales)
    groups = range(scale.shape[0])
    rows = jnp.concatenate([jnp.where(seen, p * scale[g : g + 1], 0.0) for g in groups]).astype(dtype)
    shift = [jnp.where(seen, p * zero[g : g + 1], 0.0).sum(1, keepdims=True) for g in groups]
    raw = common.dot(rows, tiles).reshape(len(groups), *p.shape[:1], -1)
    own = _groups(values, raw.shape[1:])
    return functools.reduce(lambda a, g: jnp.where(own[g], raw[g] + shift[g], a), groups[1:], raw[0] + shift[0])


def _weigh_channels(values: Packed, p, codes, scales, at) -> Float32[Array, "M D"]:
    """Sum over groups of scale * (p . codes) + zero * sum(p); all groups within 128 tokens share one product."""
    shared, lane = _token_groups(values, p.shape[0])
    total = jnp.zeros((p.shape[0], codes.shape[1]), jnp.float32)
    for tile in range(0, p.shape[1], LANES):
        piece = p[:, tile : tile + LANES]
        parts = [jnp.where(lane == u, piece, 0.0) for u in range(shared)]
        raw = common.dot(jnp.concatenate(parts).astype(codes.dtype), codes[tile : tile + LANES])
        raw = raw.reshape(shared, *p.shape[:1], -1)
        for u, part in enumerate(parts):
            group = common.quotient(at + tile, values.group) + u
            scale, zero = (ref[pl.ds(group, 1), :] for ref in scales)
            whole = part.sum(1, keepdims=True)  # 0 for rows that see nothing of the group, which may be NaN
            total += jnp.where(whole != 0.0, raw[u] * scale + whole * zero, 0.0)
    return total
