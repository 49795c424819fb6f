"""The kernel of jax_triton.py, in Triton's own language.

Terms (block, span, run, sub-tile) are those of `gpu_layout.Cut`; `P` is the plan, a `gpu.AttentionPlan`.
"""

import triton
import triton.language as tl

from pallas_kernels import gpu_layout
from pallas_kernels.layout import MASKED
from pallas_kernels.packed_attention import gpu

LOWEST = tl.constexpr(gpu.LOWEST)
UNSEEN = tl.constexpr(MASKED)
LIFT = tl.constexpr(gpu_layout.LIFT)
LOG2_E = tl.constexpr(gpu_layout.LOG2_E)


# Triton cannot call methods; at compile time it calls only functions with this decorator.
@triton.constexpr_function
def row_of(stored, plane, first):
    return stored.place(plane, first)[0]


@triton.constexpr_function
def shift_of(stored, plane, first):
    return stored.place(plane, first)[1]


@triton.constexpr_function
def planes_of(stored):
    return len(stored.widths)


@triton.constexpr_function
def mask_of(stored, plane):
    return (1 << stored.widths[plane]) - 1


@triton.constexpr_function
def height_of(stored, plane, tokens):
    """Byte rows of `tokens` tokens in a plane."""
    return tokens * stored.widths[plane] // 8


@triton.constexpr_function
def assembly(stored, first, scaled):
    return stored.assembly(first, scaled)


@triton.constexpr_function
def operands(stored, scaled):
    return stored.operands(scaled)


@triton.constexpr_function
def offset_of(stored, light):
    return stored.offset(light)


@triton.constexpr_function
def folds(stored):
    """Whether scales multiply scores or probabilities: a token has only one scale."""
    return not stored.exact and stored.per == "token" and stored.groups == 1


@triton.constexpr_function
def power_above(n):
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def shared_tokens(stored, cut):
    return stored.shared_tokens(cut.run)


@triton.jit
def load_values(plane, stored: tl.constexpr, cut: tl.constexpr, first: tl.constexpr, head, block, low, end):
    """Loads exact values [rows, D]; zeros for tokens outside [low, end)."""
    x = load_bytes(plane, 0, stored, cut, first, head, block)
    token = tl.arange(0, cut.rows)
    at = (block * cut.repeats + token // cut.run) * cut.span + first + token % cut.run
    return tl.where(((at >= low) & (at < end))[:, None], x, 0.0)


@triton.jit
def load_bytes(plane, index: tl.constexpr, stored: tl.constexpr, cut: tl.constexpr, first: tl.constexpr, head, block):
    """Loads [rows, D] of a plane: bytes, or the values themselves where they are exact."""
    token = tl.arange(0, cut.rows)
    span = block * cut.repeats + token // cut.run
    row = span * height_of(stored, index, cut.span) + row_of(stored, index, first) + token % cut.run
    height: tl.constexpr = height_of(stored, index, stored.tokens)
    if stored.tokens % cut.block:
        row = tl.minimum(row, height - 1)
    width: tl.constexpr = power_above(stored.channels)
    channel = tl.arange(0, width)
    at = plane + head * (height * stored.channels) + row[:, None] * stored.channels + channel[None, :]
    return tl.load(at, mask=(channel < stored.channels)[None, :], other=0)  # no mask where it is always true


@triton.jit
def load_scales(scale, stored: tl.constexpr, cut: tl.constexpr, first: tl.constexpr, head, block, low, end):
    """Loads scales or zero points of a sub-tile, as `spread` takes them; zeros for tokens outside [low, end).

    That is [rows] or [rows, groups] per token, and [cells, D] per channel.
    """
    if stored.per == "token":
        token = tl.arange(0, cut.rows)
        at = (block * cut.repeats + token // cut.run) * cut.span + first + token % cut.run
        base = scale + head * (stored.groups * stored.tokens) + tl.minimum(at, stored.tokens - 1)
        inside = (at >= low) & (at < end)
        if stored.groups == 1:
            x = tl.load(base, mask=inside, other=0.0)
        else:
            groups: tl.constexpr = power_above(stored.channels) // stored.group
            group = tl.minimum(tl.arange(0, groups), stored.groups - 1)
            mask = tl.broadcast_to(inside[:, None], (cut.rows, groups))
            x = tl.load(base[:, None] + group[None, :] * stored.tokens, mask=mask, other=0.0)
    else:
        width: tl.constexpr = power_above(stored.channels)
        cell: tl.constexpr = shared_tokens(stored, cut)
        token = tl.arange(0, cut.rows // cell) * cell
        at = (block * cut.repeats + token // cut.run) * cut.span + first + token % cut.run
        height: tl.constexpr = stored.tokens // stored.group
        row = tl.minimum(at // stored.group, height - 1)
        inside = (row * stored.group + stored.group > low) & (row * stored.group < end)
        channel = tl.arange(0, width)
        at = scale + head * (height * stored.channels) + row[:, None] * stored.channels + channel[None, :]
        x = tl.load(at, mask=inside[:, None] & (channel < stored.channels)[None, :], other=0.0)
    return x


@triton.jit
def spread(x, stored: tl.constexpr, cut: tl.constexpr):
    """The scale or zero point of every value, [rows, D], from those loaded."""
    width: tl.constexpr = power_above(stored.channels)
    if stored.per == "channel":
        cell: tl.constexpr = shared_tokens(stored, cut)
        x = tl.broadcast_to(x[:, None, :], (cut.rows // cell, cell, width)).reshape(cut.rows, width)
    elif stored.groups == 1:
        x = tl.broadcast_to(x[:, None], (cut.rows, width))
    else:
        groups: tl.constexpr = width // stored.group
        x = tl.broadcast_to(x[:, :, None], (cut.rows, groups, stored.group)).reshape(cut.rows, width)
    return x


@triton.jit
def folded_scales(scale, zero, stored: tl.constexpr, cut: tl.constexpr, head, block, low, end):
    """Loads scales and zero points of all sub-tiles of a block, where they fold; of the last block for one beyond.

    The loop carries them for a block, because Triton fetches no loads of 2 bytes a thread ahead. Scales that are
    spread over values are too many to carry: registers would spill.
    """
    tiles: tl.constexpr = cut.tiles
    held = ()
    if folds(stored):
        block = tl.minimum(block, (stored.tokens - 1) // cut.block)
        for tile in tl.static_range(tiles):
            x = load_scales(scale, stored, cut, tile * cut.run, head, block, low, end)
            y = load_scales(zero, stored, cut, tile * cut.run, head, block, low, end)
            held = held + (x, y)  # type: ignore[assignment]  # noqa: RUF005
    return held


@triton.jit
def plain_codes(p0, p1, stored: tl.constexpr, cut: tl.constexpr, first: tl.constexpr, head, block):
    word = load_bytes(p0, 0, stored, cut, first, head, block)
    code = (word >> shift_of(stored, 0, first)) & mask_of(stored, 0)
    if planes_of(stored) == 2:
        word = load_bytes(p1, 1, stored, cut, first, head, block)
        code = code | (((word >> shift_of(stored, 1, first)) & mask_of(stored, 1)) << stored.widths[0])
    return code.to(tl.float32)


@triton.jit
def codes(p0, p1, stored: tl.constexpr, cut: tl.constexpr, first: tl.constexpr, head, block, P: tl.constexpr):
    """Unpacks codes plus `offset_of`, exact in bfloat16 and float32."""
    if P.light and not P.interpret:
        asm: tl.constexpr = assembly(stored, first, False)
        names: tl.constexpr = operands(stored, False)
        word = load_bytes(p0, 0, stored, cut, first, head, block)
        if planes_of(stored) == 2:
            more = load_bytes(p1, 1, stored, cut, first, head, block)
            x = tl.inline_asm_elementwise(asm, names, [word, more], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            x = tl.inline_asm_elementwise(asm, names, [word], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        x = plain_codes(p0, p1, stored, cut, first, head, block)
        if P.light:
            x = (x + offset_of(stored, True)).to(tl.bfloat16)
    return x


@triton.jit
def dequantized(
    p0,
    p1,
    scale,
    zero,
    stored: tl.constexpr,
    cut: tl.constexpr,
    first: tl.constexpr,
    head,
    block,
    low,
    end,
    P: tl.constexpr,
):
    """Computes codes * scale + zero in float16, or in float32 where queries are float32; 0 outside [low, end)."""
    s = spread(load_scales(scale, stored, cut, first, head, block, low, end), stored, cut)
    z = spread(load_scales(zero, stored, cut, first, head, block, low, end), stored, cut)
    if P.light and not P.interpret:
        asm: tl.constexpr = assembly(stored, first, True)
        names: tl.constexpr = operands(stored, True)
        word = load_bytes(p0, 0, stored, cut, first, head, block)
        if planes_of(stored) == 2:
            more = load_bytes(p1, 1, stored, cut, first, head, block)
            x = tl.inline_asm_elementwise(asm, names, [word, more, s, z], dtype=tl.float16, is_pure=True, pack=4)
        else:
            x = tl.inline_asm_elementwise(asm, names, [word, s, z], dtype=tl.float16, is_pure=True, pack=4)
    else:
        x = plain_codes(p0, p1, stored, cut, first, head, block) * s.to(tl.float32) + z.to(tl.float32)
        if P.light:
            x = x.to(tl.float16)
    return x


@triton.jit
def product(a, b, P: tl.constexpr):
    if P.interpret:  # Triton's interpreter has no products of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def weighed(x, weights, p, P: tl.constexpr):
    """Sums of values x [rows, D] times weights; a value of probability p 0 adds nothing to a column, NaN neither."""
    if P.tokens > 1:  # columns see different tokens
        wide = x.to(tl.float32)
        finite = tl.abs(wide) < float("inf")  # false for NaN
        ones = tl.where(finite, 0.0, 1.0).to(x.dtype)
        lost = product(tl.trans(ones), tl.where(p != 0, 1.0, 0.0).to(x.dtype), P)
        sums = product(tl.trans(tl.where(finite, wide, 0.0).to(x.dtype)), weights, P)
        sums = tl.where(lost > 0, float("nan"), sums)
    else:
        sums = product(tl.trans(x), weights, P)
    return sums


@triton.jit
def attend_kernel(
    q,
    start,
    stop,
    each,
    k0,
    k1,
    k_scale,
    k_zero,
    v0,
    v1,
    v_scale,
    v_zero,
    output,
    lse,
    P: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    """Attention over a part of a sequence's blocks, output [B, K, parts, R, V] and lse; grid (B, K, parts)."""
    sequence, index = tl.program_id(0), tl.program_id(2)
    head = (sequence * KV_HEADS + tl.program_id(1)).to(tl.int64)
    keys: tl.constexpr = P.keys
    values: tl.constexpr = P.values
    cut: tl.constexpr = P.cut
    tiles: tl.constexpr = cut.tiles
    first_query, edge = tl.load(start + sequence), tl.load(stop + sequence)
    column = tl.minimum(tl.arange(0, P.columns), P.rows - 1)
    query = first_query + column // P.ratio
    depth: tl.constexpr = power_above(keys.channels)
    width: tl.constexpr = power_above(values.channels)
    channel = tl.arange(0, depth)
    question = q + head * (P.rows * keys.channels) + column[None, :] * keys.channels + channel[:, None]
    question = tl.load(question, mask=(channel < keys.channels)[:, None], other=0.0)  # [D, columns]
    factor = tl.full((P.columns,), P.scale * LOG2_E, tl.float32)
    sums = tl.sum(question.to(tl.float32), 0)
    if P.light and not keys.exact and not folds(keys):
        # bfloat16 has a wider range than float16: each query is divided by a power of two, which is exact.
        bits = tl.max(tl.abs(question.to(tl.float32)), 0).to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        question = (question.to(tl.float32) * inverse[None, :]).to(tl.float16)
        factor *= bits.to(tl.float32, bitcast=True)
    low = tl.full((), P.first, tl.int32)
    if P.window is not None:
        low = tl.maximum(low, first_query + 1 - P.window)
    high = tl.minimum(edge, first_query + P.tokens)
    begin = low // cut.block
    end = tl.cdiv(high, cut.block)
    own = tl.load(each)
    begin += index * own
    highest = tl.full((P.columns,), LOWEST, tl.float32)
    total = tl.zeros((cut.rows, P.columns), tl.float32)
    zeros = tl.zeros((cut.rows, P.columns), tl.float32)
    answer = tl.zeros((width, P.columns), tl.float32)
    token = tl.arange(0, cut.rows)
    k_held = folded_scales(k_scale, k_zero, keys, cut, head, begin, low, high)
    v_held = folded_scales(v_scale, v_zero, values, cut, head, begin, low, high)
    for block in range(begin, tl.minimum(begin + own, end)):
        k_next = folded_scales(k_scale, k_zero, keys, cut, head, block + 1, low, high)
        v_next = folded_scales(v_scale, v_zero, values, cut, head, block + 1, low, high)
        for tile in tl.static_range(tiles):
            at = (block * cut.repeats + token // cut.run) * cut.span + tile * cut.run + token % cut.run
            if keys.exact:
                x = load_bytes(k0, 0, keys, cut, tile * cut.run, head, block)
            elif folds(keys):
                x = codes(k0, k1, keys, cut, tile * cut.run, head, block, P)
            else:
                x = dequantized(k0, k1, k_scale, k_zero, keys, cut, tile * cut.run, head, block, low, high, P)
            scores = product(x.to(question.dtype), question, P) * factor[None, :]
            if folds(keys):
                scale = k_held[2 * tile].to(tl.float32)
                zero = k_held[2 * tile + 1].to(tl.float32) - scale * offset_of(keys, P.light)
                scores = scores * scale[:, None] + (factor * sums)[None, :] * zero[:, None]
            seen = at[:, None] < tl.minimum(query + 1, edge)[None, :]
            if P.first:
                seen &= (at >= P.first)[:, None]
            if P.window is not None:
                seen &= at[:, None] > (query - P.window)[None, :]
            scores = tl.where(seen, scores, UNSEEN)
            new = tl.maximum(highest, tl.max(scores, 0))
            fade = tl.exp2(highest - new)
            p = tl.exp2(scores - new[None, :])
            highest = new
            total = total * fade[None, :] + p
            answer *= fade[None, :]
            if folds(values):
                scale, zero = v_held[2 * tile].to(tl.float32)[:, None], v_held[2 * tile + 1].to(tl.float32)[:, None]
                some = p != 0  # 0 times NaN is NaN
                scale, zero = tl.where(some, scale, 0.0), tl.where(some, zero, 0.0)
                weights = (p * scale).to(tl.bfloat16 if P.light else tl.float32)
                zeros = zeros * fade[None, :] + p * zero
                zeros -= offset_of(values, P.light) * weights.to(tl.float32)
                x = codes(v0, v1, values, cut, tile * cut.run, head, block, P)
                answer += product(tl.trans(x), weights, P)
            elif values.exact:
                x = load_values(v0, values, cut, tile * cut.run, head, block, low, high)
                answer += weighed(x, p.to(x.dtype), p, P)
            else:
                x = dequantized(v0, v1, v_scale, v_zero, values, cut, tile * cut.run, head, block, low, high, P)
                weights = (p * (LIFT if P.light else 1.0)).to(x.dtype)
                answer += weighed(x, weights, p, P)
        k_held, v_held = k_next, v_next
    answer += tl.sum(zeros, 0)[None, :]
    whole = tl.sum(total, 0)
    lift: tl.constexpr = LIFT if P.light and not values.exact and not folds(values) else 1.0
    found = whole != 0  # NaN counts as found
    safe = tl.where(found, whole, 1.0)
    row = tl.arange(0, P.columns)
    known = row < P.rows
    part = (head * P.parts + index) * P.rows
    value = tl.arange(0, width)
    place = output + part * values.channels + row[None, :] * values.channels + value[:, None]
    answer = tl.where(found[None, :], answer / (safe * lift)[None, :], 0.0)
    tl.store(place, answer, mask=known[None, :] & (value < values.channels)[:, None])
    tl.store(lse + part + row, tl.where(found, highest / LOG2_E + tl.log(safe), UNSEEN), mask=known)
