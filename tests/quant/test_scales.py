"""Scales and zero points of 8 bits: their bytes against float8 types of numpy, and what is lost."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.quant import affine, scales
from kvjax.testing.layers import QUICK

BITS = (1, 2, 3, 4, 5, 6, 8)
from_bytes, to_bytes, storable = (
    jax.jit(function, compiler_options=QUICK)
    for function in (scales.from_bytes, scales.to_bytes, lambda *args: scales.storable(*args, 8))
)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), compiler_options=QUICK)
def quantize(x, bits, axis=-1, fit="minmax", scale_bits=8):
    return affine.quantize(x, bits, axis, x.shape[axis], None, fit, scale_bits)


def errors(x, *how):
    """Squared error of every row of x, in float64."""
    q = quantize(x, *how)
    scale, zero = (np.asarray(a, np.float64) for a in (q.scale, q.zero))
    return ((np.asarray(q.codes) * scale + zero - x) ** 2).sum(-1)


@functools.partial(jax.jit, compiler_options=QUICK)
def width_as_data(x, levels):
    return affine.quantize_to(x, levels, -1, x.shape[-1], None, "mse", 8)


def levels_of(bits):
    return np.float32(2**bits - 1)


def drawn(seed, size=512):
    """Scales and zero points of groups whose middles are up to 60 ranges away."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-7, 3, size)).astype(np.float32)
    return scale, (scale * rng.standard_normal(size) * np.exp(rng.uniform(-3, 4, size))).astype(np.float32)


def values(seed, shape, middle):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.uniform(-3, 3, (shape[0], 1)))
    return (rng.standard_normal(shape) * spread + middle).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_mean_what_the_page_says(bits):
    """s has 5 bits of exponent and 3 of mantissa; the middle is a float8_e4m3fn, in ranges."""
    levels, every = levels_of(bits), np.arange(256, dtype=np.uint8)
    scale = np.array([(8 * (e > 0) + m) / 8 * 2.0 ** (max(e, 1) - 15) for e in range(31) for m in range(8)])
    part = every.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = np.isfinite(part)
    s, z = (a.astype(np.float64) for a in map(np.asarray, from_bytes(every[: len(scale), None], every, levels)))
    np.testing.assert_array_equal(s, scale[:, None])
    wanted = scale[:, None] * (part * (levels + 1.0) - levels / 2.0)
    small = finite & (np.abs(wanted) < 65504)
    np.testing.assert_array_equal(z[small], wanted[small].astype(np.float16))


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_storable_comes_back_from_its_bytes(bits, seed):
    levels = levels_of(bits)
    stored = storable(*drawn(seed), levels)
    for found, wanted in zip(storable(*stored, levels), stored, strict=True):
        np.testing.assert_array_equal(found, wanted)
    stored = [np.asarray(a).astype(np.float16) for a in stored]
    for found, wanted in zip(from_bytes(*to_bytes(*stored, levels), levels), stored, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_scales_and_middles_are_the_nearest(bits, seed):
    given, levels = drawn(seed), levels_of(bits)
    scale, zero = (np.asarray(a, np.float64) for a in storable(*given, levels))
    assert (np.abs(scale / given[0] - 1) <= 1 / 16 + 2.0**-11).all()
    middle, wanted = (z + s * levels / 2 for s, z in ((scale, zero), given))
    rounding = np.abs(zero) * 2.0**-10 + scale * (levels + 1) / 1024  # of float16, and of middles near 0
    assert (np.abs(middle - wanted) <= np.abs(wanted) / 16 + rounding).all()


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), middle=st.sampled_from([0.0, 1.0, -40.0]))
def test_no_value_is_further_than_half_a_step(bits, seed, middle):
    x = values(seed, (64, 32), middle)
    q = quantize(x, bits)
    scale, zero = (np.asarray(a, np.float64) for a in (q.scale, q.zero))
    off = np.abs(np.asarray(q.codes) * scale + zero - x)
    rounded = np.abs(zero) * 2.0**-11 + scale * 2.0 ** (bits - 11)  # z to float16, and the range's own scale
    assert (off <= scale * 0.5 + rounded + np.abs(x) * 2.0**-20).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_error_is_that_of_float16_within_a_few_parts(bits):
    x = values(bits, (512, 32), 0.0)
    for fit, most in (("minmax", 1.06), ("mse", 1.15)):
        assert 0.97 < np.mean(errors(x, bits, -1, fit) / errors(x, bits, -1, fit, 16)) < most


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_fitted_error_is_never_above_that_of_min_max(bits):
    x = values(bits, (128, 32), 0.5)
    plain, fitted = (errors(x, bits, -1, fit) for fit in ("minmax", "mse"))
    assert (fitted <= plain * 1.003).all()  # errors are summed as whole numbers
    assert fitted.sum() < plain.sum()


@pytest.mark.parametrize("bits", [2, 8])
def test_order_and_company_change_no_bit(bits):
    x = values(bits, (24, 64), 0.5)
    order = np.random.default_rng(bits).permutation(64)
    q = quantize(x, bits, -1, "mse")
    others = [
        quantize(x[:, order], bits, -1, "mse"),
        quantize(np.ascontiguousarray(x.T), bits, -2, "mse"),
        jax.tree.map(lambda *a: np.concatenate(a), *[quantize(x[i : i + 1], bits, -1, "mse") for i in range(24)]),
        width_as_data(x, levels_of(bits)),
    ]
    for other in others:
        np.testing.assert_array_equal(np.ravel(other.scale), np.ravel(q.scale))
        np.testing.assert_array_equal(np.ravel(other.zero), np.ravel(q.zero))


def test_groups_that_float16_cannot_hold_read_back_as_nan():
    x = np.zeros((4, 16), np.float32)
    x[0, 3], x[1, 3], x[2] = np.nan, 1e9, 7.0
    for fit in ("minmax", "mse"):
        q = quantize(x, 2, -1, fit)
        kept = to_bytes(q.scale, q.zero, levels_of(2))
        back = np.asarray([np.ravel(a) for a in from_bytes(*kept, levels_of(2))])
        assert np.isnan(back[:, :2]).all() and not back[:, 3].any()
        off = np.asarray(affine.dequantize(q, -1, 16, jnp.float32))[2] - 7
        assert np.abs(off).max() < 7 / 32  # a group of one value: its middle is as far away as 8 ranges
