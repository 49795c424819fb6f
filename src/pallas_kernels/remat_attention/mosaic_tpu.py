"""Rematerialising attention on TPU: keys are rebuilt from stored rows in VMEM.

Rows of a chunk of tokens are dequantised once for all kv heads of a grid step. The matrix unit turns them into keys;
as values they are used directly. Heads are spread over the grid where their weights would not fit into VMEM.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import mosaic_tpu_common as common
from pallas_kernels.layout import MASKED, Packed, by_kv_head, by_query
from pallas_kernels.mosaic_tpu_common import LANES, PackedRefs
from pallas_kernels.remat_attention.weights import Rebuild

ROWS = 128  # query rows per kv head at most
BLOCK = 512  # tokens of a grid step by default
CHUNK = 256  # tokens computed at a time
HEADS = 8  # kv heads of a grid step at most
WEIGHT_BYTES = 2 << 20  # of the weights of a grid step; the pipeline holds those of two steps
MODEL_PIECE = 1024  # channels of a grid step of `reconstruct`


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
    block: int | None = None,
) -> tuple[Float32[Array, "B T H s"], Float32[Array, "B T H"]]:
    """See `pallas_kernels.remat_attention`; `block` is the number of tokens per grid step."""
    batch, queries, heads, channels = q.shape
    _, latent_heads, tokens, width = values.shape
    kv_heads = rebuild.kv_heads(channels)
    ratio = heads // kv_heads
    rows = queries * ratio
    if rows > ROWS:
        raise NotImplementedError(f"{rows} query rows per kv head; expected at most {ROWS}")
    padded = -(-rows // 8) * 8
    tensors = (keys,) if keys is values else (keys, values)
    hold = common.heads_of(*tensors)
    own = 1 if latent_heads > 1 else _heads_of_step(rebuild, kv_heads, channels)
    chunk = common.chunk_of(*tensors, least=CHUNK)
    block = common.block_of(*tensors, heads=hold, chunk=chunk, block=block or BLOCK)
    bounds = common.bounds_of(start, stop, queries, first, window)
    q = jnp.pad(by_kv_head(q, kv_heads), ((0, 0), (0, 0), (0, padded - rows), (0, 0)))

    def at(b, i, bounds):
        return common.block_at(bounds, b, i, tokens, block)

    def stored(b, k, i, bounds):
        return b, k if latent_heads > 1 else 0, at(b, i, bounds)

    def per_head(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, hold * own, padded, columns), lambda b, k, i, bounds: (b, k, 0, 0))

    weights = pl.BlockSpec(
        (hold, keys.shape[3], own * channels), lambda b, k, i, bounds: (k, 0, 0) if latent_heads > 1 else (0, 0, k)
    )
    table = pl.BlockSpec((block, channels), lambda b, k, i, bounds: (at(b, i, bounds), 0))
    flat = pl.BlockSpec((hold * own, 1, channels), lambda b, k, i, bounds: (k, 0, 0))
    whole = pl.BlockSpec((1, channels), lambda b, k, i, bounds: (0, 0))
    steps = kv_heads // (hold * own)
    bias = None if rebuild.bias is None else rebuild.bias[:, None]
    norm = None if rebuild.norm is None else rebuild.norm.reshape(1, -1)
    output, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            keys,
            values,
            own=own,
            queries=queries,
            ratio=ratio,
            first=first,
            window=window,
            scale=scale,
            block=block,
            chunk=chunk,
            eps=rebuild.eps,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, steps, common.steps_of(tokens, queries, first, window, block)),
            in_specs=[
                per_head(channels),
                [common.stream_specs(packed, hold, block, stored) for packed in tensors],
                weights,
                (table, table),
                None if bias is None else flat,
                None if norm is None else whole,
            ],
            out_specs=[per_head(width), per_head(1)],
            scratch_shapes=[
                *(pltpu.VMEM((hold * own, padded, columns), jnp.float32) for columns in (1, 1, width)),
                [common.scale_scratch(packed, hold, block) for packed in tensors],
                [pltpu.VMEM((chunk, packed.shape[3]), q.dtype) for packed in tensors],
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, padded, n), jnp.float32) for n in (width, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="remat_attention",
    )(bounds, q, [common.stream(packed) for packed in tensors], rebuild.up, (rebuild.cos, rebuild.sin), bias, norm)
    output, lse = (by_query(a[:, :, :rows], queries) for a in (output, lse))
    return output, lse[..., 0]


def _heads_of_step(rebuild: Rebuild, kv_heads: int, channels: int) -> int:
    """Returns the number of kv heads that share the rows of a grid step: whole tiles of weights that fit VMEM.

    Raises:
      NotImplementedError: the weights of the fewest heads that a step can take are too large.
    """
    each = rebuild.up.shape[1] * channels * rebuild.up.dtype.itemsize
    fits = [
        n
        for n in range(1, kv_heads + 1)
        if kv_heads % n == 0 and (n * channels % LANES == 0 or n == kv_heads) and n * each <= WEIGHT_BYTES
    ]
    if not fits:
        raise NotImplementedError(f"weights of {each} bytes per head")
    return max((n for n in fits if n <= HEADS), default=min(fits))


def _kernel(
    keys: Packed,
    values: Packed,
    bounds,
    q_ref,
    streams: list[PackedRefs],
    up_ref,
    tables,
    bias_ref,
    norm_ref,
    out_ref,
    lse_ref,
    top_ref,
    sum_ref,
    acc_ref,
    scale_refs,
    row_refs,
    *,
    own: int,
    queries: int,
    ratio: int,
    first: int,
    window: int | None,
    scale: float,
    block: int,
    chunk: int,
    eps: float,
) -> None:
    tensors = [keys, values][: len(streams)]
    sequence, step = pl.program_id(0), pl.program_id(2)
    low, high = bounds[2, sequence], bounds[3, sequence]
    base = (common.quotient(low, block) + step) * block
    channels = q_ref.shape[2]

    @pl.when(step == 0)
    def _():
        common.reset(top_ref, sum_ref, acc_ref)

    @pl.when(base < high)
    def _():
        for packed, refs, scales in zip(tensors, streams, scale_refs, strict=True):
            common.widen_scales(packed, refs, scales)
        edges = common.edges_of(q_ref.shape[1], ratio, bounds, sequence, first, window)
        inside = (low - base, high - base)

        def latent_head(g, _):
            sources = [
                common.of_head(packed, g, refs, scales)
                for packed, refs, scales in zip(tensors, streams, scale_refs, strict=True)
            ]

            def body(i, _):
                at = pl.multiple_of(i * chunk, chunk)
                for packed, source, ref in zip(tensors, sources, row_refs, strict=True):
                    _fill(packed, *source, at, inside, ref)
                up = up_ref[g].astype(q_ref.dtype)
                raw = common.dot(row_refs[0][...], up)
                seen = common.seen(edges, base + at, chunk)
                cos, sin = (table[pl.ds(at, chunk), :].astype(jnp.float32) for table in tables)
                for j in range(own):
                    h = g * own + j
                    k = raw[:, j * channels : (j + 1) * channels]
                    if bias_ref is not None:
                        k = k + bias_ref[h].astype(jnp.float32)
                    if norm_ref is not None:
                        k = k * jax.lax.rsqrt(jnp.mean(k * k, 1, keepdims=True) + eps)
                        k = k * norm_ref[...].astype(jnp.float32)
                    k = _turn(k, cos, sin).astype(q_ref.dtype)
                    scores = jnp.where(seen, common.dot(q_ref[h], k, transposed=True) * scale, MASKED)
                    top, p, faded = common.soften(scores, seen, top_ref[h])
                    top_ref[h] = top
                    sum_ref[h] = sum_ref[h] * faded + p.sum(1, keepdims=True)
                    acc_ref[h] = acc_ref[h] * faded + common.weighed(p, row_refs[-1][...], queries > 1)

            jax.lax.fori_loop(*common.chunks_of(base, low, high, block, chunk), body, None)

        jax.lax.fori_loop(0, up_ref.shape[0], latent_head, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...], lse_ref[...] = common.finish(top_ref, sum_ref, acc_ref)


def _fill(packed: Packed, planes, scales, at: Int32[Array, ""], inside: tuple, out_ref) -> None:
    """Dequantises the tokens of a block from `at` on; those outside `inside`, which may be NaN, become 0."""
    count = out_ref.shape[0]
    token = at + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    used = (token >= inside[0]) & (token < inside[1])
    for first, last in common.pieces_of(packed):
        piece = common.dequantized(packed, planes, scales, at, count, (first, last))
        out_ref[:, first:last] = jnp.where(used, piece, 0.0).astype(out_ref.dtype)


def _turn(k: Float32[Array, "N D"], cos: Float32[Array, "N D"], sin: Float32[Array, "N D"]) -> Float32[Array, "N D"]:
    """RoPE in HF's half-split convention."""
    half = k.shape[1] // 2
    if k.shape[1] % LANES == 0:
        lane = jax.lax.broadcasted_iota(jnp.int32, k.shape, 1)
        return k * cos + pltpu.roll(k, half, 1) * jnp.where(lane < half, -sin, sin)
    return k * cos + jnp.concatenate([-k[:, half:], k[:, :half]], 1) * sin


def reconstruct(
    below: Float[Array, "B S M"],
    delta: Packed,
    up: Float[Array, "r M"],
    until: Int[Array, "B"],
    *,
    interpret: bool = False,
    block: int | None = None,
) -> Float[Array, "B S M"]:
    """See `pallas_kernels.remat_attention.reconstruct`; `block` is the number of tokens per grid step."""
    batch, _, model_dim = below.shape
    _, _, tokens, width = delta.shape
    columns = max(LANES, WEIGHT_BYTES // (width * up.dtype.itemsize) // LANES * LANES)
    columns = min(columns, MODEL_PIECE, model_dim)
    chunk = common.chunk_of(delta, least=CHUNK)
    block = common.block_of(delta, heads=1, chunk=chunk, block=block or CHUNK)

    def at(b, i, until):
        return jnp.minimum(i, common.quotient(jnp.maximum(until[b] - 1, 0), block))

    rows = pl.BlockSpec((None, block, columns), lambda m, b, i, until: (b, at(b, i, until), m))
    stored = common.stream_specs(delta, 1, block, lambda m, b, i, until: (b, 0, at(b, i, until)))
    return pl.pallas_call(
        functools.partial(_reconstruct_kernel, delta, block=block, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(model_dim, columns), batch, pl.cdiv(tokens, block)),
            in_specs=[rows, stored, pl.BlockSpec((width, columns), lambda m, b, i, until: (0, m))],
            out_specs=rows,
            scratch_shapes=[common.scale_scratch(delta, 1, block), pltpu.VMEM((chunk, width), below.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct(below.shape, below.dtype),
        input_output_aliases={1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="reconstruct",
    )(until.astype(jnp.int32), below, common.stream(delta), up)


def _reconstruct_kernel(
    delta: Packed, until, below_ref, refs: PackedRefs, up_ref, out_ref, scales, row_ref, *, block, chunk
):
    """Reconstructs one block. Blocks past `until` are skipped, except the first, which is then copied unchanged."""
    step = pl.program_id(2)
    end = until[pl.program_id(1)] - step * block

    @pl.when((end > 0) | (step == 0))
    def _():
        common.widen_scales(delta, refs, scales)
        planes, of_head = common.of_head(delta, 0, refs, scales)

        def body(i, _):
            at = pl.multiple_of(i * chunk, chunk)
            _fill(delta, planes, of_head, at, (0, end), row_ref)
            old = below_ref[pl.ds(at, chunk), :]
            new = old.astype(jnp.float32) + common.dot(row_ref[...], up_ref[...].astype(row_ref.dtype))
            token = at + jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
            out_ref[pl.ds(at, chunk), :] = jnp.where(token < end, new.astype(old.dtype), old)

        jax.lax.fori_loop(0, block // chunk, body, None)
