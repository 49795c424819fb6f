"""Fitted scales and zero points: their squared error against a search in float64, and what may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.quant import affine
from kvjax.testing.layers import QUICK

LAYOUTS = [((4, 9, 32), -1, 32), ((4, 9, 24), -1, 24), ((3, 128, 6), -2, 64)]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 5), compiler_options=QUICK)
def quantize(x, bits, axis, group, mask=None, fit="mse"):
    return affine.quantize(x, bits, axis, group, mask, fit)


@functools.partial(jax.jit, static_argnums=(2, 3, 5))
def width_as_data(x, levels, axis, group, mask, fit):
    return affine.quantize_to(x, levels, axis, group, mask, fit)


def by_group(a, axis, group):
    """[groups, group]"""
    return np.moveaxis(np.asarray(a), axis, -1).reshape(-1, group)


def errors(x, q, axis, group, mask):
    """Squared error of every group, in float64."""
    scale, zero = (by_group(a, axis, 1).astype(np.float64) for a in (q.scale, q.zero))
    off = by_group(q.codes, axis, group) * scale + zero - by_group(x, axis, group)
    return (np.where(by_group(mask, axis, group), off, 0) ** 2).sum(-1)


def narrowed(values, real, bits):
    """Of each narrowed range and group, in float64: scale, squared error, and that of the refit to its codes.

    The refit's error is infinite where the search must not take it.
    """
    levels, count = 2**bits - 1, np.maximum(real.sum(1), 1)
    low, high = (np.where(real, values, end).T for end in (np.inf, -np.inf))
    low, high = np.where(real.any(1), low.min(0), 0), np.where(real.any(1), high.max(0), 0)
    widest = (np.float32(high - low) / np.float32(levels)).astype(np.float16).astype(np.float64)
    found = []
    for part in np.float32([1, 0.92, 0.84, 0.76, 0.68, 0.6]):
        scale = np.float16(part * np.float32(widest)).astype(np.float64)
        shift = np.float32(widest) * (1 - part) * np.float32(levels) / 2
        zero = np.float16(np.float32(np.float16(low)) + shift).astype(np.float64)
        codes = np.rint(np.clip((values - zero[:, None]) / np.where(scale > 0, scale, 1)[:, None], 0, levels))
        total = lambda a: np.where(real, a, 0).sum(1)  # noqa: E731
        error = total((codes * scale[:, None] + zero[:, None] - values) ** 2)
        c, x = (np.where(real, a - (total(a) / count)[:, None], 0) for a in (codes, values))
        spread = total(c * c)
        slope = total(c * x) / np.where(spread > 0, spread, np.inf)
        allowed = (spread > 0) & (slope > 0.51 * widest)
        found.append((scale, error, np.where(allowed, total((slope[:, None] * c - x) ** 2), np.inf)))
    return (np.stack(each) for each in zip(*found, strict=True))


def values(seed, shape, exponent, outliers):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0**exponent + rng.standard_normal()
    return np.where(rng.random(shape) < outliers, 8 * x, x).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-6, 6),
    outliers=st.sampled_from([0.0, 0.03]),
    keep=st.sampled_from([0.02, 0.5, 1.0]),
)
def test_error_is_no_worse_than_that_of_any_candidate(bits, layout, seed, exponent, outliers, keep):
    """Not than minimum and maximum, any narrowed range, or the exact refit of the best; no group is left out.

    What may be lost is what the search rounds: its errors, where two candidates tie, the distances of a refit (to a
    part of a step), and scales and zero points, to float16.
    """
    shape, axis, group = layout
    x = values(seed, shape, exponent, outliers)
    mask = np.random.default_rng(seed).random(shape) < keep
    fitted, plain = (quantize(x, bits, axis, group, mask, fit) for fit in ("mse", "minmax"))
    found, bound = (errors(x, q, axis, group, mask) for q in (fitted, plain))
    entries, real, levels = by_group(x, axis, group).astype(np.float64), by_group(mask, axis, group), 2**bits - 1
    scale, error, refit = narrowed(entries, real, bits)
    step = np.maximum(scale[0], by_group(fitted.scale, axis, 1)[:, 0].astype(np.float64))
    part = 2.0 ** np.floor(np.log2(2**24 / (255 * group**1.5)))
    squared = 2.0 ** np.floor(np.log2(2**24 / group**2))
    rounded = real.sum(1) * step**2 * (1 / squared + levels * 2.0**-21)
    ceiling = (error.min(0) + rounded) * (1 + 2.0**-20)
    assert (found <= bound + rounded).all()
    searched = bound <= real.sum(1) * scale[0] ** 2 * 0.99  # otherwise float16 rounds the zero point by steps
    assert (found[searched] <= ceiling[searched]).all()
    assert np.asarray(fitted.codes).max() < 2**bits
    worst_refit = np.where(error <= ceiling, refit, 0).max(0)  # of those that may have been the best
    zero = np.abs(np.asarray(by_group(fitted.zero, axis, 1), np.float64)[:, 0])
    displaced = (
        step / 2 / part + levels * np.maximum(step, 2.0**-14) * 2.0**-10 + np.maximum(zero, 2.0**-14) * 2.0**-9
    )
    there = np.isfinite(worst_refit) & searched
    allowed = (np.sqrt(worst_refit) + np.sqrt(real.sum(1)) * displaced) ** 2 + rounded
    assert (found[there] <= allowed[there]).all()


def test_two_bits_of_a_gaussian():
    """The best uniform quantiser of one scale for all has an error of .1188 (Max, 1960, table II)."""
    x = np.random.default_rng(0).standard_normal((64, 128, 16)).astype(np.float32)
    real = np.ones(x.shape, bool)
    plain, fitted = (
        errors(x, quantize(x, 2, -2, 128, None, fit), -2, 128, real).mean() / 128 for fit in ("minmax", "mse")
    )
    assert fitted < 0.1188 < 0.24 < plain


@pytest.mark.parametrize("value", [0.0, 1.0, -3.14159, 65504.0, 6e-8, 1e-20])
def test_constant_groups_are_those_of_min_max(value):
    x = np.full((2, 16), value, np.float32)
    for a, b in zip(
        jax.tree.leaves(quantize(x, 2, -1, 16)),
        jax.tree.leaves(quantize(x, 2, -1, 16, None, "minmax")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_entries_do_not_count(poison):
    x, mask = values(0, (4, 64, 8), 0, 0.1), np.ones((4, 64, 1), bool)
    mask[0, :4] = mask[1, 9:] = mask[2] = False
    clean, dirty = quantize(x, 2, -2, 32, mask), quantize(np.where(mask, x, poison), 2, -2, 32, mask)
    np.testing.assert_array_equal(clean.scale, dirty.scale)
    np.testing.assert_array_equal(clean.zero, dirty.zero)
    real = np.broadcast_to(mask, x.shape)
    np.testing.assert_array_equal(np.asarray(clean.codes)[real], np.asarray(dirty.codes)[real])


def test_groups_that_float16_cannot_hold_read_back_as_nan():
    x = np.zeros((3, 16), np.float32)
    x[0, 3], x[1, 3] = np.nan, 1e9
    q = quantize(x, 2, -1, 16)
    assert np.isnan(q.scale[:2]).all() and np.isnan(q.zero[:2]).all() and not np.isnan(q.scale[2]).any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_unbiased_codes_stand_for_values_of_the_right_size(bits):
    """The codes are those of the least squared error; what is read has the mean of x, and a slope of 1 on x."""
    x = values(bits, (40, 64), 1, 0.0)
    mask = np.random.default_rng(bits).random(x.shape) < 0.9
    q, least = (quantize(x, bits, -1, 64, mask, fit) for fit in ("unbiased", "mse"))
    np.testing.assert_array_equal(q.codes, least.codes)
    scale, zero = (np.asarray(a, np.float64) for a in (q.scale, q.zero))
    codes, count = np.asarray(q.codes, np.float64), mask.sum(1, keepdims=True)
    mean = lambda a: np.where(mask, a, 0).sum(1, keepdims=True) / count  # noqa: E731
    slope = mean((codes - mean(codes)) * (x - mean(x))) / mean((x - mean(x)) ** 2)
    np.testing.assert_allclose(scale * slope, 1, atol=1 / 128)  # distances are parts of a step
    if bits == 2:
        assert np.mean(np.asarray(least.scale) * slope) < 0.95
    off = mean(codes) * scale + zero - mean(x)
    assert (np.abs(off) <= scale * (2.0**bits * 2.0**-11 + 1 / 64) + np.abs(zero) * 2.0**-10).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_integer_zero_points_are_kvtuners(bits, shift):
    """The formulas of its public code, with codes from -2^(b-1) there and from 0 here."""
    x = values(bits, (40, 64), 1, 0.05) + np.float32(shift)
    x[0] = 1.5  # a group without a range
    q = quantize(x, bits, -1, 64, None, "integer")
    low, least = x.min(1, keepdims=True), -(2 ** (bits - 1))
    s = np.asarray(q.scale, np.float32)  # theirs is not rounded to float16
    np.testing.assert_allclose(s[1:], (np.ptp(x, 1, keepdims=True) / (2**bits - 1))[1:], rtol=2**-10)
    s, low = s[1:], low[1:].astype(np.float16).astype(np.float32)
    z = np.rint(low / s) - least
    codes = np.clip(np.rint(x[1:] / s - z), least, -least - 1)
    read = np.asarray(q.codes[1:], np.float32) * s + np.asarray(q.zero[1:], np.float32)
    rounding = np.abs(np.asarray(q.zero[1:], np.float32)) * 2.0**-11 + 1e-6
    off = np.abs(read - (codes + z) * s)
    assert (off <= rounding + s * (off > s / 2)).all()  # a value between two codes may take either,
    assert np.mean(off > rounding) < 0.01 + 0.1 * 2.0 ** (bits - 8)  # where float16 moves a zero point of 2^7 scales
    np.testing.assert_array_equal(np.asarray(q.zero[0], np.float32), 1.5)


@pytest.mark.parametrize("fit", ["mse", "unbiased", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [24, 64])
def test_order_and_company_change_no_bit(bits, group, fit):
    """Entries in another order, groups alone or among others, per token or per channel."""
    x = values(bits, (40, group), 1, 0.05)
    order = np.random.default_rng(bits).permutation(group)
    quantized = lambda x, axis=-1: quantize(x, bits, axis, group, None, fit)  # noqa: E731
    q = quantized(x)
    others = [
        quantized(x[:, order]),
        quantized(np.ascontiguousarray(x.T), -2),
        jax.tree.map(lambda *a: np.concatenate(a), *[quantized(x[i : i + 1]) for i in range(40)]),
        width_as_data(x, np.float32(2**bits - 1), -1, group, None, fit),
        affine.quantize(jnp.asarray(x), bits, -1, group, None, fit),
    ]
    for other in others:
        np.testing.assert_array_equal(np.ravel(other.scale), np.ravel(q.scale))
        np.testing.assert_array_equal(np.ravel(other.zero), np.ravel(q.zero))
    np.testing.assert_array_equal(others[0].codes, np.asarray(q.codes)[:, order])
    np.testing.assert_array_equal(np.asarray(others[1].codes).T, q.codes)
