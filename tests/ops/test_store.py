"""Packed stores: what is read is what was written, quantised once, and nothing else ever changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import KvjaxError
from kvjax.ops import store
from kvjax.ops.store import Format
from kvjax.quant import affine
from kvjax.testing.layers import QUICK

B, K, D = 3, 2, 16
TOKENS = 96
TOKEN_FORMATS = [Format(bits, "token", 8, 0) for bits in (1, 2, 3, 4, 5, 6, 8, 16)]
TOKEN_FORMATS[-1:-1] = [Format(2, "token", 8, 0, "mse"), Format(4, "token", 8, 0, "minmax", 8)]
BLOCK_FORMATS = [  # tokens, groups of several blocks, a block of 24
    Format(1, "channel", 32, 32),
    Format(3, "channel", 8, 32),
    Format(4, "channel", 16, 16),
    Format(6, "token", 16, 32),
    Format(2, "token", 8, 24),
    Format(8, "channel", 8, 24),
    Format(2, "channel", 32, 32, "mse"),
    Format(3, "token", 8, 24, "mse"),
    Format(2, "channel", 8, 32, "minmax", 8),
    Format(5, "token", 8, 24, "mse", 8),
    Format(16, "token", 16, 32),
    Format(16, "channel", 32, 32),
]
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
write_tokens = quick_jit(store.write_tokens)
write_blocks = quick_jit(store.write_blocks)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def read(packed):
    """Everything, [B, S, K, D], in float64, where dequantising is exact."""
    with jax.enable_x64(True):
        return np.asarray(_read(packed))


@quick_jit
def _read(packed):
    return store.read_tile(packed, 0, packed.tokens, jnp.float64).dequantize().swapaxes(1, 2)


def reading(x, format, mask=None):
    """What a store of `format` gives back of x, whose groups are complete: [..., T, K, D]."""
    with jax.enable_x64(True):
        return np.asarray(_reading(x, format, None if mask is None else mask[..., None, None]))


@functools.partial(quick_jit, static_argnums=1)
def _reading(x, format, mask):
    if format.bits == 16:
        return x.astype(jnp.float64)
    axis = -1 if format.per == "token" else -3
    q = affine.quantize(x, format.bits, axis, format.group, mask, format.fit, format.scale_bits)
    return affine.dequantize(q, axis, format.group, jnp.float64)


def leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def full_store(format, seed=99):
    """A store with tokens at every position."""
    packed = store.init(format, B, K, TOKENS, D, jnp.float32)
    zero = jnp.zeros((B,), jnp.int32)
    return write_tokens(packed, random(seed, B, TOKENS, K, D), zero, zero + TOKENS)


@pytest.mark.parametrize("format", TOKEN_FORMATS, ids=str)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_chunks_are_one_write(format, data):
    """Ragged chunks, some of them empty for some sequences, leave the same bits as one write."""
    x = random(data.draw(st.integers(0, 1000)), B, TOKENS, K, D)
    ends = np.array([data.draw(st.integers(0, TOKENS)) for _ in range(B)])
    one = write_tokens(store.init(format, B, K, TOKENS, D, jnp.float32), x, jnp.zeros((B,), jnp.int32), ends)
    packed, at = store.init(format, B, K, TOKENS, D, jnp.float32), np.zeros(B, np.int32)
    width = 37  # of every chunk: the second half of a packing block and the first of the next
    while (at < ends).any():
        lengths = np.array([data.draw(st.integers(0, width)) for _ in range(B)], np.int32)
        lengths = np.minimum(np.maximum(lengths, at == at.min()), ends - at).astype(np.int32)
        index = np.minimum(at[:, None] + np.arange(width), TOKENS - 1)
        chunk = np.take_along_axis(x, index[:, :, None, None], 1)
        chunk[np.arange(width) >= lengths[:, None]] = 1e4  # padding that must not show
        packed = write_tokens(packed, chunk, at, lengths)
        at = at + lengths
    leaves_equal(packed, one)
    back, expected = read(packed), reading(x, format)
    for b in range(B):
        np.testing.assert_array_equal(back[b, : ends[b]], expected[b, : ends[b]])
        assert not back[b, ends[b] :].any()


@pytest.mark.parametrize("format", TOKEN_FORMATS, ids=str)
@settings(max_examples=6, deadline=None)
@given(
    start=st.lists(st.integers(0, TOKENS - 37), min_size=B, max_size=B),
    lengths=st.lists(st.integers(0, 37), min_size=B, max_size=B),
)
def test_neighbours_are_left_alone(format, start, lengths):
    before = full_store(format)
    x = random(5, B, 37, K, D)
    after = write_tokens(before, x, np.array(start, np.int32), np.array(lengths, np.int32))
    expected, new = read(before).copy(), reading(x, format)
    for b in range(B):
        expected[b, start[b] : start[b] + lengths[b]] = new[b, : lengths[b]]
    np.testing.assert_array_equal(read(after), expected)


@pytest.mark.parametrize("format", TOKEN_FORMATS, ids=str)
def test_tokens_beyond_the_end_are_dropped(format):
    before = full_store(format)
    x = random(5, B, 37, K, D)
    after = write_tokens(before, x, np.array([TOKENS - 5, TOKENS, TOKENS + 40]), np.array([37, 37, 37]))
    expected = read(before).copy()
    expected[0, -5:] = reading(x, format)[0, :5]
    np.testing.assert_array_equal(read(after), expected)


@pytest.mark.parametrize("format", [TOKEN_FORMATS[2], BLOCK_FORMATS[1], BLOCK_FORMATS[3]], ids=str)
def test_blocks_read_alone(format):
    """A block is a slice of the whole."""
    packed = store.init(format, B, K, TOKENS, D, jnp.float32)
    if format.residual_length:
        x = random(1, B, 3, 32, K, D)
        index = np.broadcast_to(np.arange(3), (B, 3))
        packed = write_blocks(packed, x, np.ones((B, 3, 32), bool), index)
    else:
        packed = full_store(format)
    whole = read(packed)
    one = quick_jit(lambda packed, start: store.read_tile(packed, start, 32, jnp.float64).dequantize())
    with jax.enable_x64(True):
        for start in (0, 32, 64):
            np.testing.assert_array_equal(one(packed, start).swapaxes(1, 2), whole[:, start : start + 32])


@pytest.mark.parametrize("format", BLOCK_FORMATS, ids=str)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_blocks_land_where_they_belong(format, seed, data):
    r, rng = format.residual_length, np.random.default_rng(seed)
    count = TOKENS // r
    everywhere = np.broadcast_to(np.arange(count), (B, count))
    base = random(98, B, count, r, K, D)
    packed = store.init(format, B, K, TOKENS, D, jnp.float32)
    packed = write_blocks(packed, base, np.ones((B, count, r), bool), everywhere)
    expected = reading(base, format).reshape(B, TOKENS, K, D).copy()
    np.testing.assert_array_equal(read(packed), expected)
    x = random(seed, B, 2, r, K, D)
    mask = rng.random((B, 2, r)) < data.draw(st.sampled_from([0.2, 0.9, 1.0]))
    dropped = (count, count + 1)  # one is the first beyond the end
    index = np.stack([rng.permutation(count + 2)[:2] for _ in range(B)])
    after = write_blocks(packed, x, mask, index)
    new, touched, meaningless = reading(x, format, mask=mask), np.zeros((B, TOKENS), bool), []
    for b, n in np.ndindex(B, 2):
        if index[b, n] not in dropped:
            rows = slice(index[b, n] * r, (index[b, n] + 1) * r)
            expected[b, rows], touched[b, rows] = new[b, n], True
            meaningless += [(b, index[b, n] * r + i) for i in np.flatnonzero(~mask[b, n])]
    back = read(after)
    real = np.ones((B, TOKENS), bool)
    if format.bits != 16 and meaningless:
        real[tuple(np.transpose(meaningless))] = False
    np.testing.assert_array_equal(back[real], expected[real])
    assert np.isfinite(back).all()


@pytest.mark.parametrize("format", BLOCK_FORMATS, ids=str)
def test_dropped_blocks_leave_every_bit(format):
    r, count = format.residual_length, TOKENS // format.residual_length
    x, mask = random(1, B, count, r, K, D), np.ones((B, count, r), bool)
    packed = store.init(format, B, K, TOKENS, D, jnp.float32)
    packed = write_blocks(packed, x, mask, np.broadcast_to(np.arange(count), (B, count)))
    for index in (count, count + 7):
        leaves_equal(write_blocks(packed, x + 1, mask, np.full((B, count), index)), packed)
    index = np.full((B, count), count)
    index[1, 2] = 0  # one block of one sequence
    after = write_blocks(packed, x + 1, mask, index)
    leaves_equal(jax.tree.map(lambda a: a[::2], after), jax.tree.map(lambda a: a[::2], packed))
    np.testing.assert_array_equal(read(after)[1, r:], read(packed)[1, r:])
    np.testing.assert_array_equal(read(after)[1, :r], reading(x + 1, format)[1, 2])


@pytest.mark.parametrize("format", [f for f in BLOCK_FORMATS if f.bits < 16], ids=str)
@pytest.mark.parametrize("poison", [1e30, np.nan])
def test_masked_tokens_touch_no_other(format, poison):
    r, mask = format.residual_length, np.ones((B, 1, format.residual_length), bool)
    mask[:, :, :3], mask[1] = False, False
    x = random(1, B, 1, r, K, D)
    dirty = np.where(mask[..., None, None], x, poison)
    index = np.zeros((B, 1), np.int32)
    empty = store.init(format, B, K, TOKENS, D, jnp.float32)
    clean, poisoned = (read(write_blocks(empty, a, mask, index)) for a in (x, dirty))
    np.testing.assert_array_equal(poisoned[::2, 3:r], clean[::2, 3:r])
    np.testing.assert_array_equal(clean[::2, 3:r], reading(x, format, mask=mask)[::2, 0, 3:])
    assert np.isfinite(poisoned).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("block", [0, 32])
def test_exact_formats_keep_the_values(dtype, block):
    packed = store.init(Format(16, "token", D, block), B, K, TOKENS, D, dtype)
    assert packed.scale is packed.zero is None
    x = jnp.asarray(random(1, B, 32, K, D)).astype(dtype)
    if block:
        packed = write_blocks(packed, x[:, None], np.ones((B, 1, 32), bool), np.ones((B, 1), np.int32))
    else:
        packed = write_tokens(packed, x, np.full((B,), 32), np.full((B,), 32))
    assert packed.planes[0].dtype == dtype
    back = read(packed)
    np.testing.assert_array_equal(back[:, 32:64], np.asarray(x, np.float64))
    assert not back[:, :32].any() and not back[:, 64:].any()


@pytest.mark.parametrize("format", [TOKEN_FORMATS[2], BLOCK_FORMATS[1], TOKEN_FORMATS[-1]], ids=str)
def test_float64_and_bfloat16_inputs(format):
    """The quantiser sees float32; what is exact keeps the store's dtype."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 32, K, D)))
        for value in (x, x.astype(jnp.bfloat16)):
            packed = store.init(format, B, K, 32, D, value.dtype)
            if format.residual_length:
                mask, at = np.ones((B, 1, 32), bool), np.zeros((B, 1), np.int32)
                packed = write_blocks(packed, value[:, None], mask, at)
            else:
                packed = write_tokens(packed, value, np.zeros(B, np.int32), np.full(B, 32, np.int32))
            np.testing.assert_array_equal(read(packed), reading(value, format))


WIDTHS = (1, 2, 3, 4, 5, 6, 8)


@quick_jit
def codes_of(history):
    """Codes, scales and zero points of everything."""
    block = store.read_tile(history, 0, history.tokens, jnp.uint8)
    return block.codes, block.scale, block.zero


def empty_pair(format):
    """Empty stores: packed, and with the width as data in a format of 8 bits."""
    packed, eight = (
        store.init(f, B, K, TOKENS, D, jnp.float32) for f in (format, dataclasses.replace(format, bits=8))
    )
    return packed, store.unpacked(eight, jnp.float32(2**format.bits - 1))


def check_pair(packed, other):
    leaves_equal(codes_of(packed), codes_of(other))
    assert (packed.tokens, packed.heads) == (other.tokens, other.heads) == (TOKENS, K)


def test_tokens_with_the_width_as_data():
    """Ragged chunks, the last partly beyond the end; one program for all widths."""
    write = quick_jit(lambda *args: store.write_tokens(*args))
    chunks = [([0, 0, 0], [37, 5, 0]), ([37, 5, 0], [0, 37, 20]), ([90, 42, 20], [37, 37, 37])]
    for bits in WIDTHS:
        packed, other = empty_pair(Format(bits, "token", 8, 0))
        for seed, chunk in enumerate(chunks):
            x, (at, lengths) = random(seed, B, 37, K, D), np.array(chunk, np.int32)
            packed, other = write_tokens(packed, x, at, lengths), write(other, x, at, lengths)
            check_pair(packed, other)
        assert np.asarray(other.codes).max() == 2**bits - 1
    assert write._cache_size() == 1
    np.testing.assert_array_equal(read(packed), read(other))


@pytest.mark.parametrize(
    ("format", "widths"),
    [
        (Format(8, "channel", 8, 24), WIDTHS),
        (Format(8, "channel", 32, 32), (1,)),
        (Format(8, "token", 8, 24), (2,)),
        (Format(8, "token", 16, 32), (6,)),
        (Format(8, "channel", 32, 32, "mse"), (2, 4)),
        (Format(8, "channel", 8, 24, "minmax", 8), (2, 4)),
    ],
    ids=str,
)
def test_blocks_with_the_width_as_data(format, widths):
    """Some entries masked, some blocks dropped, some written twice; one program for all widths."""
    write, write_packed = (quick_jit(lambda *args: store.write_blocks(*args)) for _ in range(2))
    rng = np.random.default_rng(format.group)
    count = TOKENS // format.residual_length
    for bits in widths:
        packed, other = empty_pair(dataclasses.replace(format, bits=bits))
        for keep in (1.0, 0.5, 0.02):
            x, mask = (
                random(bits, B, 2, format.residual_length, K, D),
                rng.random((B, 2, format.residual_length)) < keep,
            )
            index = np.stack([rng.permutation(count + 1)[:2] for _ in range(B)])  # `count` is beyond the end
            packed, other = write_packed(packed, x, mask, index), write(other, x, mask, index)
            check_pair(packed, other)
        assert np.asarray(other.codes).max() == 2**bits - 1
    assert write._cache_size() == 1
    np.testing.assert_array_equal(read(packed), read(other))


@pytest.mark.parametrize("bits", [3, 8])
def test_unpacked_goes_on_from_what_is_there(bits):
    packed = full_store(Format(bits, "token", 8, 0))
    other = store.unpacked(packed, jnp.float32(2**bits - 1))
    check_pair(packed, other)
    x, at, lengths = random(5, B, 37, K, D), np.array([3, 40, 90]), np.array([37, 1, 37])
    check_pair(write_tokens(packed, x, at, lengths), write_tokens(other, x, at, lengths))


@pytest.mark.parametrize(
    ("max_len", "formats", "tokens"),
    [
        (1, [Format(16, "token", D, 0)], 1),
        (33, [Format(16, "token", D, 0)], 33),
        (33, [Format(4, "token", D, 0)], 64),
        (33, [Format(4, "token", D, 0), Format(16, "token", D, 0)], 64),
        (64, [Format(4, "channel", 32, 32)] * 2, 64),
        (65, [Format(4, "channel", 32, 128), Format(2, "token", 32, 128)], 128),
        (25, [Format(4, "channel", 8, 24)], 48),
        (25, [Format(4, "channel", 8, 24, scale_bits=8)], 48),
    ],
    ids=str,
)
def test_capacity(max_len, formats, tokens):
    assert store.capacity(max_len, *formats) == tokens
    for format in formats:
        packed = store.init(format, 1, 1, tokens, 32, jnp.float32)
        assert packed.tokens == tokens
        codes = sum(leaf.size * leaf.dtype.itemsize for leaf in packed.planes)
        if format.bits < 16:
            assert 8 * codes == format.bits * tokens * 32
            bits = 8 * (packed.scale.nbytes + packed.zero.nbytes)
            assert bits == 2 * format.scale_bits * tokens * 32 / format.group


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Format, 4, "channel", 32, 0),
        functools.partial(Format, 4, "channel", 32, 48),
        functools.partial(Format, 4, "token", 32, 12),
    ],
)
def test_refuses_blocks_that_do_not_fit(make):
    with pytest.raises(KvjaxError, match="residual"):
        make()
