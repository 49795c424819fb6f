"""Packing: b bits cost b bits, and nothing is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.quant import packing

BITS = (1, 2, 3, 4, 5, 6, 8)
codes_of = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([(8, 1), (24, 3), (32, 5), (2, 3, 40, 4)]))


pack = jax.jit(packing.pack, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def round_trip(codes, bits):
    """The planes, and the codes that they give."""
    planes = packing.pack(codes, bits)
    return planes, packing.unpack(planes, bits)


def draw(case, bits):
    seed, shape = case
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(case=codes_of)
def test_round_trip_in_b_bits(bits, case):
    codes = draw(case, bits)
    planes, back = round_trip(codes, bits)
    assert all(plane.dtype == jnp.uint8 for plane in planes)
    assert 8 * sum(plane.size for plane in planes) == bits * codes.size
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_extremes(bits):
    for value in {0, 1, 2**bits - 1}:
        codes = jnp.full((16, 3), value, jnp.uint8)
        np.testing.assert_array_equal(packing.unpack(packing.pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_is_stored_once(bits):
    """Flipping any one bit of any one code flips exactly one bit of the bytes, another each time."""
    codes = draw((bits, (16, 2)), bits)

    def image(codes):
        planes = packing.pack(jnp.asarray(codes), bits)
        return np.unpackbits(np.concatenate([np.asarray(plane).ravel() for plane in planes]))

    base, seen = image(codes), []
    for place in np.ndindex(codes.shape):
        for bit in range(bits):
            flipped = codes.copy()
            flipped[place] ^= 1 << bit
            (changed,) = np.flatnonzero(image(flipped) != base)
            seen.append(changed)
    assert sorted(seen) == list(range(base.size))


@pytest.mark.parametrize(("bits", "low"), [(3, 2), (5, 4), (6, 4)])
@settings(max_examples=10, deadline=None)
@given(case=codes_of)
def test_odd_widths_are_sums_of_planes(bits, low, case):
    codes = draw(case, bits)
    planes = pack(codes, bits)
    np.testing.assert_array_equal(planes[0], pack(codes & (2**low - 1), low)[0])
    np.testing.assert_array_equal(planes[1], pack(codes >> low, bits - low)[0])


@pytest.mark.parametrize("bits", BITS)
def test_leading_axes_and_columns_are_apart(bits):
    codes = draw((7, (2, 3, 40, 4)), bits)
    planes = [np.asarray(plane) for plane in pack(codes, bits)]
    for plane, alone in zip(planes, pack(codes[1, 2], bits), strict=True):
        np.testing.assert_array_equal(plane[1, 2], alone)
    for plane, alone in zip(planes, pack(codes[..., 2:3], bits), strict=True):
        np.testing.assert_array_equal(plane[..., 2:3], alone)
