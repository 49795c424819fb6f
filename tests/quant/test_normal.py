"""Quantisers of normal numbers against what defines them, and against the tables of Max (1960)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtri

from kvjax.quant.normal import lloyd_max, uniform_step

NUMBERS = ndtri((np.arange(200_000) + 0.5) / 200_000)  # as normal as so many numbers can be


def errors(levels: np.ndarray) -> float:
    return float(np.square(NUMBERS[:, None] - levels).min(1).mean())


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_are_the_means_of_what_is_nearest(bits: int, error: float) -> None:
    levels = lloyd_max(bits)
    assert len(levels) == 2**bits and (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-12)
    nearest = np.abs(NUMBERS[:, None] - levels).argmin(1)
    means = [NUMBERS[nearest == code].mean() for code in range(2**bits)]
    np.testing.assert_allclose(levels, means, atol=2e-3)
    assert errors(levels) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize(
    ("bits", "step", "error"), [(1, 1.5958, 0.3634), (2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154)]
)
def test_steps_are_the_best(bits: int, step: float, error: float) -> None:
    found, places = uniform_step(bits), np.arange(2**bits) - (2**bits - 1) / 2
    assert found == pytest.approx(step, abs=1e-4)
    best = errors(found * places)
    assert best == pytest.approx(error, rel=2e-3)
    assert best < min(errors(0.97 * found * places), errors(1.03 * found * places))
