"""Blockwise attention equals float64 softmax attention over the dequantised keys and values."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.models.config import RopeConfig
from kvjax.models.rope import make_rope
from kvjax.ops import attention, dispatch, store
from kvjax.ops.attention import Span
from kvjax.ops.store import Format
from kvjax.testing.layers import QUICK

B, K, D, S = 2, 3, 64, 736  # S is several blocks of the XLA implementation, and no multiple of them
KIVI = (Format(4, "channel", 32, 32), Format(2, "token", 32, 32))
TOKEN = (Format(8, "token", D, 0), Format(4, "token", D, 0))
ODD = (Format(3, "token", 16, 0), Format(16, "token", D, 0))
EXACT_KEYS = (Format(16, "channel", 32, 32), Format(2, "token", 32, 32))
EXACT = (Format(16, "token", D, 0), Format(16, "token", D, 0))
FORMATS = {"kivi": KIVI, "token": TOKEN, "odd": ODD, "exact-keys": EXACT_KEYS, "exact": EXACT}

quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.partial(quick_jit, static_argnums=(4, 6))
def attend_packed(q, positions, keys, values, first, stop, window, table=None):
    return attention.attend_packed(q, Span(positions, first, stop, window), keys, values, table)


attend_exact = quick_jit(attention.attend_exact, static_argnums=5)
merge = quick_jit(attention.merge)
attend_streamed = quick_jit(attention.attend_streamed, static_argnums=(3, 4))


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(q, q_positions, k, v, k_positions, window):
    """Softmax attention in float64: output, and log-sum-exp; q [B, T, H, D], k and v [B, N, K, D]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    scores = np.einsum("bthd,bnhd->bthn", q, k) / np.sqrt(q.shape[-1])
    at, seen = q_positions[:, :, None, None], k_positions[:, None, None, :]
    visible = (seen >= 0) & (seen <= at)
    if window is not None:
        visible &= seen > at - window
    with np.errstate(all="ignore"):
        scores = np.where(visible, scores, -np.inf)
        top = np.maximum(scores.max(-1), -1e9)
        lse = top + np.log(np.exp(scores - top[..., None]).sum(-1))
        return np.einsum("bthn,bnhd->bthd", np.exp(scores - lse[..., None]), v), lse


@functools.cache
def history(name, tokens=S):
    """A full store of keys and one of values."""
    stores = []
    for seed, format in enumerate(FORMATS[name]):
        x = random(seed, B, tokens, K, D) + random(seed + 7, 1, 1, K, D)
        empty = store.init(format, B, K, tokens, D, jnp.float32)
        if format.residual_length:
            blocks = x.reshape(B, -1, format.residual_length, K, D)
            index = np.broadcast_to(np.arange(blocks.shape[1]), blocks.shape[:2])
            stores.append(quick_jit(store.write_blocks)(empty, blocks, np.ones(blocks.shape[:3], bool), index))
        else:
            zero = np.zeros(B, np.int32)
            stores.append(quick_jit(store.write_tokens)(empty, x, zero, zero + tokens))
    return stores


@functools.partial(quick_jit, static_argnums=1)
def read(packed, dtype):
    return store.read_tile(packed, 0, packed.tokens, dtype).dequantize().swapaxes(1, 2)


@functools.cache
def dequantized(name, dtype=jnp.float32):
    return [np.asarray(read(a, dtype)) for a in history(name)]


def check(part, expected, atol=3e-5):
    """Rows that see no key mean nothing, but are finite."""
    output, lse = expected
    some = np.isfinite(lse)
    np.testing.assert_allclose(np.asarray(part.output)[some], output[some], atol=atol)
    np.testing.assert_allclose(np.asarray(part.lse)[some], lse[some], atol=atol)
    assert np.isfinite(part.output).all() and np.isfinite(part.lse).all()
    assert (np.asarray(part.lse)[~some] < -1e20).all()  # no weight in any merge


CASES = [  # formats, queries, heads per kv head, start of the queries, stop, first, window
    ("kivi", 1, 3, [700, 93], [672, 64], 0, None),
    ("kivi", 3, 1, [735, 0], [736, 0], 5, 100),
    ("kivi", 40, 4, [600, 33], [576, 32], 0, 300),
    ("kivi", 300, 2, [352, 64], [352, 64], 4, None),
    ("token", 1, 8, [700, 93], [701, 94], 0, 150),
    ("token", 3, 5, [700, 0], [703, 2], 0, None),
    ("token", 40, 7, [690, 93], [730, 93], 3, None),
    ("token", 300, 1, [400, 0], [700, 250], 0, 200),
    ("odd", 1, 6, [736, 1], [736, 1], 0, None),
    ("odd", 40, 3, [600, 20], [640, 31], 9, 64),
    ("exact-keys", 1, 3, [700, 93], [672, 64], 2, 500),
    ("exact-keys", 300, 3, [400, 93], [384, 64], 0, 500),
    ("exact", 1, 4, [700, 0], [701, 1], 0, 90),
    ("exact", 3, 3, [700, 93], [703, 96], 4, None),
    ("exact", 300, 3, [400, 2], [700, 260], 0, 90),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_packed(case):
    name, tokens, per_head, start, stop, first, window = case
    start, stop = np.array(start, np.int32), np.array(stop, np.int32)
    q = random(3, B, tokens, K * per_head, D)
    positions = start[:, None] + np.arange(tokens, dtype=np.int32)
    keys, values = history(name)
    part = attend_packed(q, positions, keys, values, first, stop, window)
    index = np.broadcast_to(np.arange(S), (B, S))
    seen = np.where((index >= first) & (index < stop[:, None]), index, -1)
    check(part, reference(q, positions, *dequantized(name), seen, window))
    assert part.output.dtype == jnp.float32


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["token", "kivi", "exact"])
def test_keys_before_rope(name, tokens):
    rope = make_rope(RopeConfig(), D)
    start, stop = np.array([640, 50], np.int32), np.array([640, 32], np.int32)
    positions = start[:, None] + np.arange(tokens, dtype=np.int32)
    q = random(3, B, tokens, 2 * K, D)
    table = rope.table(jnp.arange(S), jnp.float32)
    part = attend_packed(q, positions, *history(name), 0, stop, None, table)
    k, v = dequantized(name)
    angle = np.arange(S)[:, None] * np.asarray(rope.inv_freq, np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = k[..., : D // 2], k[..., D // 2 :]
    rotated = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    index = np.broadcast_to(np.arange(S), (B, S))
    seen = np.where(index < stop[:, None], index, -1)
    check(part, reference(q, positions, rotated, v, seen, None), 2e-4)  # angles of float32


@pytest.mark.parametrize("name", ["token", "kivi", "exact"])
def test_float64(name):
    start, stop = np.array([700, 93], np.int32), np.array([672, 64], np.int32)
    with jax.enable_x64(True):
        for tokens in (1, 40):
            positions = start[:, None] + np.arange(tokens, dtype=np.int32)
            q = random(3, B, tokens, 4 * K, D).astype(np.float64)
            part = attend_packed(q, positions, *history(name), 0, stop, None)
            index = np.broadcast_to(np.arange(S), (B, S))
            seen = np.where(index < stop[:, None], index, -1)
            check(part, reference(q, positions, *dequantized(name, jnp.float64), seen, None), 1e-12)


EXACT_CASES = [  # keys before the chunk, queries, heads per kv head, window
    (0, 1, 3, None),
    (700, 1, 2, 100),
    (36, 40, 4, None),
    (36, 40, 1, 17),
    (0, 300, 3, None),
    (36, 300, 2, 20),
    (300, 300, 1, 290),
    (5, 600, 1, 64),
]


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_attend_exact(case):
    before, tokens, per_head, window = case
    rng = np.random.default_rng(0)
    positions = np.array([[before], [before + 9]]) + np.arange(tokens)
    old = positions[:, :1] - before + np.arange(before)
    old = np.where(rng.random(old.shape) < 0.7, old, -1)  # holes: a residual that is not full
    own = np.where(np.arange(tokens) < np.array([[tokens], [tokens // 2]]), positions, -1)
    seen = np.concatenate([old, own], 1).astype(np.int32)
    q, (k, v) = random(0, B, tokens, K * per_head, D), random(1, 2, B, before + tokens, K, D)
    part = attend_exact(q, positions, k, v, seen, window)
    check(part, reference(q, positions, k, v, seen, window))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a kernel for TPU")
@pytest.mark.parametrize(("before", "window"), [(0, None), (36, None), (36, 20)])
def test_a_chunk_by_a_kernel_of_its_own(before, window):
    """Beside what lies before it; what is asked beyond a sequence's end is nobody's."""
    tokens = 140
    positions = np.array([[before], [before + 9]]) + np.arange(tokens)
    old = positions[:, :1] - before + np.arange(before)
    lengths = np.array([[tokens], [tokens // 2]])
    own = np.where(np.arange(tokens) < lengths, positions, -1)
    seen = np.concatenate([np.where(np.arange(before) % 3, old, -1), own], 1).astype(np.int32)
    q, k, v = (
        jnp.asarray(random(i, B, n, heads, 64)).astype(jnp.bfloat16)
        for i, (n, heads) in enumerate([(tokens, 2 * K), (before + tokens, K), (before + tokens, K)])
    )
    with dispatch.using(causal_attention="splash", interpret=jax.default_backend() == "cpu"):
        found = attention.attend_exact(q, positions, k, v, seen, window)
    wanted = attention.attend_exact(q, positions, k, v, seen, window)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=0.02)
        np.testing.assert_allclose(a[1, : tokens // 2], b[1, : tokens // 2], atol=0.02)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_tiles_of_another_platform(platform, monkeypatch):
    """They are larger there, which changes nothing."""
    here = attention.tile_size(2000, 1024, 300)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert attention.tile_size(2000, 1024, 300) > here
    q, k, v = random(0, B, 40, K, D), *random(1, 2, B, 1400, K, D)
    positions = np.broadcast_to(np.arange(1400), (B, 1400))
    part = attention.attend_exact(q, positions[:, -40:], k, v, positions, None)
    check(part, reference(q, positions[:, -40:], k, v, positions, None))


@pytest.mark.parametrize("tokens", [1, 300])
def test_bfloat16(tokens):
    """Scores and sums are float32 or wider."""
    q, k, v = (jnp.asarray(random(i, B, tokens, K, D)).astype(jnp.bfloat16) for i in range(3))
    positions = np.broadcast_to(np.arange(tokens), (B, tokens))
    part = attend_exact(q, positions, k, v, positions, None)
    assert part.output.dtype == part.lse.dtype == jnp.float32
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    check(part, reference(q, positions, k, v, positions, None))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["kivi", "token", "odd", "exact"])
def test_products_of_bfloat16(name, tokens, monkeypatch):
    """Where a platform multiplies them faster, factors are rounded to bfloat16, once, and sums are not."""
    monkeypatch.setattr(attention, "_BFLOAT16", (jax.default_backend(),))
    q = jnp.asarray(random(3, B, tokens, 2 * K, D)).astype(jnp.bfloat16)
    positions = jnp.array([[690], [93]]) + jnp.arange(tokens)
    keys, values = history(name)

    def attend(q, keys, values):
        span = Span(positions, 0, jnp.array([704, 96]), None)
        packed = attention.attend_packed(q, span, keys, values)
        own = [jnp.asarray(random(i, B, tokens, K, D)).astype(jnp.bfloat16) for i in (4, 5)]
        return packed, attention.attend_exact(q, positions, *own, positions, None)

    with dispatch.using(packed_attention="xla", causal_attention="xla"):
        lowered = jax.jit(attend, compiler_options=QUICK).lower(q, keys, values)
    products = re.findall(r"dot_general.* : (.*)", lowered.as_text())
    assert products and all(re.fullmatch(r"\(.*bf16>, .*bf16>\) -> .*xf32>", each) for each in products), products
    packed, own = lowered.compile()(q, keys, values)
    at = np.broadcast_to(np.arange(S), (B, S))
    seen = np.where(at < np.array([[704], [96]]), at, -1)
    check(packed, reference(q, positions, *dequantized(name), seen, None), 0.02)
    exact = (jnp.asarray(random(i, B, tokens, K, D)).astype(jnp.bfloat16) for i in (4, 5))
    check(own, reference(q, positions, *exact, positions, None), 0.02)


@pytest.mark.parametrize("name", ["token", "kivi"])
def test_large_scores(name):
    """The running maximum keeps exponentials finite, in whatever order large scores come."""
    q = 300 * random(3, B, 3, K, D)
    positions = np.full((B, 3), 735) + np.arange(3) - 2
    keys, values = history(name)
    part = attend_packed(q, positions, keys, values, 0, np.array([736, 736]), None)
    seen = np.broadcast_to(np.arange(S), (B, S))
    output, _ = reference(q, positions, *dequantized(name), seen, None)
    assert np.isfinite(part.output).all()
    np.testing.assert_allclose(part.output, output, atol=3e-3)  # float32 scores of a few thousands


@pytest.mark.parametrize("tokens", [1, 40])
def test_merge_of_splits_is_the_whole(tokens):
    start = np.array([700, 300], np.int32)
    positions = start[:, None] + np.arange(tokens, dtype=np.int32)
    q = random(3, B, tokens, 2 * K, D)
    keys, values = history("kivi")
    stop = np.array([672, 288], np.int32)
    whole = attend_packed(q, positions, keys, values, 0, stop, None)
    cuts = [0, 4, 320, 600]
    parts = [
        attend_packed(q, positions, keys, values, a, np.minimum(b, stop), None)
        for a, b in zip(cuts, [*cuts[1:], S], strict=True)
    ]
    np.testing.assert_allclose(merge(parts), whole.output, atol=1e-5)
    np.testing.assert_allclose(merge(parts[::-1]), whole.output, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.integers(1, 4), scale=st.sampled_from([0.1, 1, 30]))
def test_merge_of_any_partition(seed, parts, scale):
    rng = np.random.default_rng(seed)
    q, (k, v) = scale * rng.standard_normal((1, 2, 2, 8)), rng.standard_normal((2, 1, 50, 1, 8))
    positions, index = np.full((1, 2), 99), np.arange(50)[None]
    owner = rng.integers(0, parts, 50)
    pieces = []
    for i in range(parts + 1):  # one of them is empty
        output, lse = reference(q, positions, k, v, np.where(owner == i, index, -1), None)
        empty = ~np.isfinite(lse)
        pieces.append(attention.Partial(np.where(empty[..., None], 0, output), np.where(empty, -1e30, lse)))
    whole, _ = reference(q, positions, k, v, index, None)
    merged = merge([jax.tree.map(np.float32, piece) for piece in pieces])
    np.testing.assert_allclose(merged, whole, atol=1e-5)


@pytest.mark.parametrize(("name", "tokens"), [("kivi", 1), ("kivi", 300), ("token", 40), ("exact", 1)])
def test_rows_that_see_nothing(name, tokens):
    """One sequence has no history at all: finite, and without weight in a merge; the other is not touched."""
    positions = np.array([[0], [400]], np.int32) + np.arange(tokens, dtype=np.int32)
    q = random(3, B, tokens, K, D)
    keys, values = history(name)
    stop = np.array([0, 400 // 32 * 32], np.int32)
    nothing = attend_packed(q, positions, keys, values, 0, stop, None)
    index = np.broadcast_to(np.arange(S), (B, S))
    seen = np.where(index < stop[:, None], index, -1)
    check(nothing, reference(q, positions, *dequantized(name), seen, None))
    k, v = random(8, B, tokens, K, D), random(9, B, tokens, K, D)
    own = attend_exact(q, positions, k, v, positions, None)
    np.testing.assert_allclose(merge([nothing, own])[0], np.asarray(own.output)[0], atol=1e-6)


FAR = 1024  # tokens: no block is larger


@pytest.mark.parametrize(("window", "tokens"), [(None, 1), (None, 40), (100, 1), (100, 300)])
@pytest.mark.parametrize("name", ["kivi", "token"])
def test_far_blocks_are_never_read(name, window, tokens):
    """Scales far beyond what queries see are NaN, and nobody notices: whole blocks are skipped."""
    total, start = 4096, np.array([2000, 2050], np.int32)
    keys, values = history(name, total)
    positions = start[:, None] + np.arange(tokens, dtype=np.int32)
    stop = start // 32 * 32
    q = random(3, B, tokens, K, D)
    clean = attend_packed(q, positions, keys, values, 0, stop, window)

    def poison(packed):
        axis = 3 if packed.format.per == "token" else 2
        rows = packed.scale.shape[axis]
        position = np.arange(rows) * (total // rows)
        far = position > start.max() + FAR
        if window is not None:
            far |= position < start.min() - window - FAR
        assert far.any()
        return packed.replace(scale=jnp.where(far if axis == 3 else far[:, None], jnp.nan, packed.scale))

    dirty = attend_packed(q, positions, poison(keys), poison(values), 0, stop, window)
    np.testing.assert_array_equal(dirty.output, clean.output)
    assert np.isfinite(dirty.output).all()


@pytest.mark.parametrize("before", [0, 36])
def test_far_blocks_of_a_chunk_are_never_read(before):
    tokens, window = 2048, 50
    seen = np.broadcast_to(np.arange(before + tokens), (B, before + tokens))
    q, k, v = (random(i, B, n, 1, D) for i, n in enumerate((tokens, before + tokens, before + tokens)))
    clean = attend_exact(q, seen[:, before:], k, v, seen, window).output
    k[:, :400], v[:, :400] = np.nan, np.nan
    early = attend_exact(q, seen[:, before:], k, v, seen, window).output
    assert np.isnan(early[:, : 400 - before]).all()
    np.testing.assert_array_equal(early[:, 400 + FAR :], clean[:, 400 + FAR :])
    k[:, :400], v[:, :400], k[:, -400:], v[:, -400:] = 0, 0, np.nan, np.nan
    late = attend_exact(q, seen[:, before:], k, v, seen, None).output
    assert np.isfinite(late[:, : tokens - 400 - 512]).all()  # the causal half


def streamed_reference(q, stored, own, block, window):
    """Query by query, in float64, for one sequence: q [T, H, D], stored and own keys and values [n, K, D]."""
    (k, v, positions), (own_k, own_v) = stored, own
    out, per_head = np.empty(q.shape), q.shape[1] // k.shape[1]
    for p in range(len(q)):
        edge = p // block * block if block else p + 1
        first = 0 if window is None else max(0, p - window + 1)
        read = (positions >= first) & (positions < edge)
        keys, values = (np.concatenate([a[read], b[max(first, edge) : p + 1]]) for a, b in ((k, own_k), (v, own_v)))
        for h in range(q.shape[1]):
            scores = keys[:, h // per_head] @ q[p, h] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[p, h] = weights @ values[:, h // per_head] / weights.sum()
    return out


STREAMED_CASES = [  # block, tokens, heads per kv head, sinks, allocated beyond the tokens, window
    (0, 300, 2, 0, 0, None),
    (0, 75, 3, 5, 21, 13),
    (32, 300, 2, 4, 20, None),
    (32, 20, 1, 3, 12, None),  # no block is complete
    (24, 515, 1, 0, 13, 50),  # divides neither 256 nor the tokens
    (96, 203, 4, 3, 85, 130),
    (32, 64, 2, 40, 0, 40),  # more sinks than a block has tokens
    (320, 700, 1, 6, 260, 90),
    (320, 970, 2, 0, 0, None),
]


@pytest.mark.parametrize("case", STREAMED_CASES, ids=str)
def test_attend_streamed(case):
    """Rows that are absent, those of a partial block, and those beyond the tokens, are far off."""
    block, tokens, per_head, sinks, more, window = case
    rng = np.random.default_rng(tokens)
    q = 2 * rng.standard_normal((B, tokens, K * per_head, 8))
    own = rng.standard_normal((2, B, tokens, K, 8))
    stored = rng.standard_normal((2, B, tokens + more + sinks, K, 8))
    positions = np.concatenate([np.arange(tokens), np.full(more, -1), np.arange(sinks)])
    positions = np.tile(positions, (B, 1))
    positions[:, :sinks] = -1  # read from the end instead
    if block:  # else a query that reads nothing would be left
        positions[:, :tokens][rng.random((B, tokens)) < 0.2] = -1
        positions[1, tokens + more :][: sinks // 2] = -1
    stored[:, positions < 0] = 50.0
    if block:
        stored[:, :, tokens // block * block : tokens] = 50.0
    with jax.enable_x64(True):
        output = attend_streamed(q, (*stored, positions.astype(np.int32)), tuple(own), block, window)
        assert output.dtype == np.float64
    for b in range(B):
        wanted = streamed_reference(q[b], (*stored[:, b], positions[b]), own[:, b], block, window)
        np.testing.assert_allclose(output[b], wanted, atol=1e-12)


def test_attend_streamed_in_bfloat16():
    """Scores and sums are float32 or wider, and what is stored may be."""
    q, k, v, own_k, own_v = (random(i, B, 75, K, D) for i in range(5))
    q, own_k, own_v = (jnp.asarray(a).astype(jnp.bfloat16) for a in (q, own_k, own_v))
    positions = np.tile(np.arange(75, dtype=np.int32), (B, 1))
    output = attend_streamed(q, (k, v, positions), (own_k, own_v), 32, None)
    assert output.dtype == jnp.bfloat16
    q, own_k, own_v = (np.asarray(a, np.float64) for a in (q, own_k, own_v))
    for b in range(B):
        wanted = streamed_reference(q[b], (k[b], v[b], positions[b]), (own_k[b], own_v[b]), 32, None)
        np.testing.assert_allclose(np.asarray(output[b], np.float64), wanted, rtol=2**-8, atol=1e-5)


UNSEEN = {  # formats, queries, start of the queries, stop, first, window
    "token": ("token", 1, [700, 93], [701, 94], 40, 90),
    "kivi": ("kivi", 1, [700, 97], [672, 96], 32, 320),
    "odd": ("odd", 3, [700, 93], [703, 96], 4, 90),
    "exact": ("exact", 1, [700, 93], [701, 94], 40, 90),
    "exact-many": ("exact", 40, [660, 53], [700, 93], 40, 90),
    "token-many": ("token", 40, [660, 53], [700, 93], 40, 90),
}


def spoilt(packed, bad, number):
    """The history with a number for scales, zero points or exact values of tokens that are bad, [B, S]."""
    if packed.scale is None:
        return dataclasses.replace(packed, planes=(jnp.where(bad[:, None, :, None], number, packed.planes[0]),))
    if packed.format.per == "token":
        where = bad[:, None, None]
    else:
        where = bad.reshape(B, 1, -1, packed.format.group).all(-1)[..., None]
    scale, zero = (jnp.where(where, jnp.float16(number), a) for a in (packed.scale, packed.zero))
    return dataclasses.replace(packed, scale=scale, zero=zero)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_not_seen_never_reaches_an_output(name):
    """NaN and infinities; nor does the NaN query of padding. A value that is not finite reaches those that see it."""
    formats, tokens, start, stop, first, window = UNSEEN[name]
    start, stop, at = np.array(start, np.int32), np.array(stop, np.int32), np.arange(S)
    positions = start[:, None] + np.arange(tokens)
    edges = positions[..., None]
    seen = (at >= first) & (at <= edges) & (at < stop[:, None, None]) & (at > edges - window)  # [B, T, S]
    bad = ~seen.any(1)
    keys, values = history(formats)
    q = random(3, B, tokens, 2 * K, D)
    plain = dispatch.using(packed_attention="xla")
    with plain:
        wanted = attend_packed(q, positions, keys, values, first, stop, window)
        found = attend_packed(
            q, positions, spoilt(keys, bad, np.nan), spoilt(values, bad, np.inf), first, stop, window
        )
        for a, b in zip(found, wanted, strict=True):
            assert np.isfinite(b).all()
            np.testing.assert_allclose(a, b, atol=1e-6)  # the same bits but where one query reads exact values
        if tokens == 1:
            return
        q[1, -1] = np.nan
        late = seen[:, -1] & ~seen[:, 0]
        output, _ = attend_packed(q, positions, keys, spoilt(values, late, np.nan), first, stop, window)
    np.testing.assert_allclose(output[:, 0], wanted.output[:, 0], atol=1e-6)
    assert np.isnan(output[:, -1]).all()


def test_what_exact_attention_does_not_see_never_reaches_an_output():
    """Slots of a residual that are not used, and padding of the chunk."""
    positions = jnp.asarray([[-1, 3, 4, 5, 6, -1], [-1, -1, -1, 0, 1, 2]])
    k, v = random(1, B, 6, K, D), random(2, B, 6, K, D)
    absent = (np.asarray(positions) < 0)[..., None, None]
    for tokens in (1, 3):
        q, at = random(3, B, tokens, K, D), positions[:, 3 : 3 + tokens]
        wanted = attend_exact(q, at, k, v, positions, None)
        found = attend_exact(q, at, np.where(absent, np.nan, k), np.where(absent, np.inf, v), positions, None)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
