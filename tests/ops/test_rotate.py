"""RoPE's cosines and sines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.ops.rotate import cos_sin


@pytest.mark.parametrize("most", [1.0, 1e3, 2.0**17, 2.0**21])
@pytest.mark.parametrize("run", [cos_sin, jax.jit(cos_sin)], ids=["eager", "jit"])
def test_cosines_and_sines_of_large_angles(run, most: float) -> None:
    angle = np.random.default_rng(0).uniform(-most, most, 200_000).astype(np.float32)
    angle[:5] = 0, most, -most, np.pi / 4, 512 * np.pi
    found, wide = run(jnp.asarray(angle)), angle.astype(np.float64)
    for values, exact in zip(found, (np.cos(wide), np.sin(wide)), strict=True):
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, exact, atol=2e-7, rtol=0)


def test_float64_is_exact() -> None:
    with jax.enable_x64(True):
        angle = jnp.linspace(-1e6, 1e6, 1001, dtype=jnp.float64)
        for values, exact in zip(cos_sin(angle), (np.cos(angle), np.sin(angle)), strict=True):
            assert values.dtype == jnp.float64
            np.testing.assert_allclose(values, exact, atol=1e-14)
