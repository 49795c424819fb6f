"""The quantiser equals a numpy oracle written from docs/design.md, bit for bit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import KvjaxError
from kvjax.quant import affine

BITS = (1, 2, 3, 4, 5, 6, 8)
LAYOUTS = [  # shape, axis, group: channels of a token, tokens of a channel
    ((3, 5, 64), -1, 64),
    ((3, 5, 80), -1, 16),
    ((3, 5, 96), -1, 32),
    ((2, 64, 5), -2, 32),
    ((2, 24, 80), -2, 8),
]


def oracle(x, bits, axis, group, mask=None):
    """Codes, float16 scales and zero points; NaN where a group cannot be stored."""
    levels = np.float32(2**bits - 1)
    x = np.moveaxis(np.asarray(x, np.float32), axis, -1)
    mask = np.ones(x.shape, bool) if mask is None else np.moveaxis(mask, axis, -1)
    x, mask = (a.reshape(*x.shape[:-1], -1, group) for a in (x, mask))
    empty = ~mask.any(-1)
    with np.errstate(all="ignore"):
        low = np.where(empty, 0, np.where(mask, x, np.inf).min(-1)).astype(np.float32)
        high = np.where(empty, 0, np.where(mask, x, -np.inf).max(-1)).astype(np.float32)
        scale, zero = ((high - low) / levels).astype(np.float16), low.astype(np.float16)
        bad = ~(np.isfinite(scale) & np.isfinite(zero))
        scale[bad] = zero[bad] = np.nan
        s, z = (a.astype(np.float32)[..., None] for a in (scale, zero))
        codes = np.where(s == 0, 0, np.clip(np.rint((x - z) / s), 0, levels))
        codes = np.nan_to_num(codes).astype(np.uint8)
    codes = np.moveaxis(codes.reshape(*codes.shape[:-2], -1), -1, axis)
    return codes, *(np.moveaxis(a, -1, axis) for a in (scale, zero))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantize(x, bits, axis, group, mask=None):
    return affine.quantize(x, bits, axis, group, mask)


@functools.partial(jax.jit, static_argnums=(2, 3))
def quantize_to(x, levels, axis, group, mask=None):
    return affine.quantize_to(x, levels, axis, group, mask)


dequantize = jax.jit(affine.dequantize, static_argnums=(1, 2, 3))


def width_as_data(x, bits, axis, group, mask=None):
    return quantize_to(x, np.float32(2**bits - 1), axis, group, mask)


def same_bits(a, b):
    a, b = (np.ascontiguousarray(x) for x in (a, b))
    assert a.dtype == b.dtype == np.float16
    np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


def check(x, bits, axis, group, mask=None, run=quantize):
    codes, scale, zero = oracle(x, bits, axis, group, mask)
    q = run(x, bits, axis, group, mask)
    same_bits(q.scale, scale)
    same_bits(q.zero, zero)
    real = np.ones(x.shape, bool) if mask is None else mask
    np.testing.assert_array_equal(np.asarray(q.codes)[real], codes[real])
    assert np.asarray(q.codes).max(initial=0) < 2**bits


def values(seed, shape, exponent, offset, grid):
    x = np.random.default_rng(seed).standard_normal(shape) * 2.0**exponent + offset
    return (np.round(x / grid) * grid + 0.0 if grid else x).astype(np.float32)  # no -0.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-26, 12),  # scales from below float16's smallest to nearly its largest
    offset=st.sampled_from([0.0, 0.0, 3.0, -100.0]),
    grid=st.sampled_from([0, 0, 0.5, 1]),  # ties
    keep=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_equals_oracle(bits, layout, seed, exponent, offset, grid, keep):
    shape, axis, group = layout
    x = values(seed, shape, exponent, offset, grid)
    mask = np.random.default_rng(seed).random(shape) < keep
    check(x, bits, axis, group, mask)


@pytest.mark.parametrize("bits", BITS)
def test_eager_equals_oracle(bits):
    x = values(bits, (3, 5, 80), 1, 0.0, 0)
    check(x, bits, -1, 16, run=affine.quantize)
    check(x.swapaxes(1, 2), bits, -2, 16, run=affine.quantize)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("run", [quantize, affine.quantize, width_as_data], ids=["jit", "eager", "data"])
def test_ties_at_every_mantissa(bits, run):
    """Scales half way between two float16 numbers, and values half way between two codes: only true division and
    rounding half to even give them."""
    levels = 2**bits - 1
    mantissa = np.arange(1024, 2048)[:, None] / 1024
    exact = mantissa * np.clip(np.arange(8) - 0.5, 0, levels)  # codes 0, 0.5, 1.5, ...
    exact[:, -1] = (mantissa * levels)[:, 0]
    check(exact.astype(np.float32), bits, -1, 8, run=run)
    between = np.zeros((1024, 8))
    between[:, -1] = ((mantissa + 1 / 2048) * levels)[:, 0]
    check(between.astype(np.float32), bits, -1, 8, run=run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_width_as_data_is_one_program_and_the_same_bits(layout):
    """Masked codes too, and groups that float16 cannot hold."""
    shape, axis, group = layout
    quantize_to.clear_cache()
    stored = []
    for seed, bits in itertools.product(range(6), BITS):
        exponent, grid = (0, 15, -20)[seed % 3], (0, 0.5)[seed % 2]
        x = values(seed, shape, exponent, 3.0, grid)
        mask = np.random.default_rng(seed).random(shape) < (0.9, 0.02)[seed // 3]
        one, other = width_as_data(x, bits, axis, group, mask), quantize(x, bits, axis, group, mask)
        same_bits(one.scale, other.scale)
        same_bits(one.zero, other.zero)
        real = np.repeat(np.isfinite(np.asarray(one.scale)), group, axis)
        stored.append(real.mean())
        np.testing.assert_array_equal(np.asarray(one.codes)[real], np.asarray(other.codes)[real])
        assert one.codes.dtype == np.uint8
    assert quantize_to._cache_size() == 1
    assert min(stored) < max(stored) == 1


def test_width_as_data_alone():
    """Traced where the values are not."""
    x, bits = jnp.asarray(values(0, (3, 16), 0, 0.0, 0)), jnp.asarray(BITS)
    q = jax.vmap(lambda levels: affine.quantize_to(x, levels, -1, 8))(2.0**bits - 1)
    for i, width in enumerate(BITS):
        check(x, width, -1, 8, run=lambda *_, i=i: jax.tree.map(lambda a: np.asarray(a)[i], q))


def test_half_to_even():
    x = np.array([0, 0.5, 1.5, 2.5, 3.5, 4.5, 13.5, 15], np.float32)
    np.testing.assert_array_equal(affine.quantize(jnp.asarray(x), 4, -1, 8).codes, [0, 0, 2, 2, 4, 4, 14, 15])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.14159, 65504.0, 6e-8, 1e-20, 1e-42])
def test_constant_group(bits, value):
    x = np.full((2, 16), value, np.float32)
    check(x, bits, -1, 16)
    q = affine.quantize(jnp.asarray(x), bits, -1, 16)
    assert not np.asarray(q.codes).any() and not np.asarray(q.scale).any()
    back = affine.dequantize(q, -1, 16, jnp.float32)
    np.testing.assert_array_equal(back, np.float32(np.float16(value)) + np.zeros_like(x))


@pytest.mark.parametrize("bits", BITS)
def test_range_below_float16(bits):
    """A range whose scale rounds to 0 in float16 reads back as its zero point."""
    x = np.linspace(0, 2e-8 * (2**bits - 1), 8, dtype=np.float32)[None]
    check(x, bits, -1, 8)
    q = affine.quantize(jnp.asarray(x), bits, -1, 8)
    assert not np.asarray(q.scale).any() and not np.asarray(q.codes).any()


@pytest.mark.parametrize("bits", BITS)
def test_masked_entries_enter_no_minimum_or_maximum(bits):
    x = values(0, (4, 32, 8), 0, 0.0, 0)
    mask = np.zeros((4, 32, 1), bool)
    mask[0, 3:], mask[1, :5], mask[2, 7] = True, True, True  # the fourth has none
    clean = quantize(x, bits, -2, 32, mask)
    for poison in (np.nan, np.inf, -np.inf, 1e30):
        dirty = affine.quantize(jnp.where(mask, x, poison), bits, -2, 32, jnp.asarray(mask))
        same_bits(dirty.scale, clean.scale)
        same_bits(dirty.zero, clean.zero)
        real = np.broadcast_to(mask, x.shape)
        np.testing.assert_array_equal(np.asarray(dirty.codes)[real], np.asarray(clean.codes)[real])
    assert not np.asarray(clean.scale)[3].any() and not np.asarray(clean.zero)[3].any()


BAD = [  # values of one group of 8, bits
    ([np.nan], 4),
    ([0.5, 1.0, np.nan, 2.0], 4),
    ([np.inf], 4),
    ([-np.inf], 8),
    ([np.nan, np.inf], 2),
    ([7e4] * 8, 4),
    ([-7e4] * 8, 4),
    ([3e38, -3e38], 4),
    ([-6e4, 6e4], 1),
    ([-65504, 65536 * 2.0], 1),
]


@pytest.mark.parametrize(("group", "bits"), BAD)
def test_refuses_what_float16_cannot_hold(group, bits):
    x = values(1, (3, 16), 0, 0.0, 0)
    x[1, : len(group)] = group
    with pytest.raises(KvjaxError, match="float16"):
        affine.quantize(jnp.asarray(x), bits, -1, 8)
    q = quantize(x, bits, -1, 8)
    back = np.asarray(affine.dequantize(q, -1, 8, jnp.float32))
    bad = np.zeros((3, 16), bool)
    bad[1, :8] = True
    np.testing.assert_array_equal(np.isnan(back), bad)
    check(x[[0, 2]], bits, -1, 8)


def test_widest_range_that_fits():
    x = np.linspace(-65504, 65504, 16, dtype=np.float32)[None]
    for bits in BITS[1:]:
        check(x, bits, -1, 16, run=affine.quantize)


@pytest.mark.parametrize("bits", [0, -1, 7, 9, 16])
def test_refuses_a_width(bits):
    with pytest.raises(KvjaxError, match=f"{bits} bits"):
        affine.quantize(jnp.zeros((8,)), bits, -1, 8)


def test_refuses_a_group_that_does_not_divide():
    with pytest.raises(KvjaxError, match="group 32 does not divide the axis of 80"):
        affine.quantize(jnp.zeros((8, 80)), 4, -1, 32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact_in_float64(bits, layout):
    shape, axis, group = layout
    codes, scale, zero = oracle(values(bits, shape, 0, 1.0, 0), bits, axis, group)
    expected = codes * np.repeat(scale.astype(float), group, axis) + np.repeat(zero.astype(float), group, axis)
    with jax.enable_x64(True):
        q = affine.Quantized(*(jnp.asarray(a) for a in (codes, scale, zero)))
        np.testing.assert_array_equal(dequantize(q, axis, group, jnp.float64), expected)
    q = affine.Quantized(*(jnp.asarray(a) for a in (codes, scale, zero)))
    single = dequantize(q, axis, group, jnp.float32)
    np.testing.assert_allclose(single, expected, rtol=1e-6, atol=1e-6)
    assert single.dtype == jnp.float32
