"""Learned levels: the best there are, by their own conditions and against a search."""

import numpy as np
import pytest

from kvjax.quant import codebook
from kvjax.quant.codebook import BINS, CENTRES


@pytest.fixture(scope="module", autouse=True)
def float64(quick_float64: None) -> None:
    """Levels are float64."""


def weights_of(seed: int) -> np.ndarray:
    """Two humps and empty bins."""
    rng = np.random.default_rng(seed)
    humps = np.exp(-(((CENTRES - 0.4) / 0.2) ** 2)) + 0.3 * np.exp(-(((CENTRES + 0.5) / 0.05) ** 2))
    return humps * rng.exponential(size=BINS) * (rng.random(BINS) < 0.9)


def cells(levels: np.ndarray) -> np.ndarray:
    """The nearest level of every bin."""
    return np.abs(CENTRES[:, None] - levels).argmin(1)


def lloyd(levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One step: every level moves to the mean of what it is nearest to."""
    at = cells(levels)
    mass, sums = (np.bincount(at, each, len(levels)) for each in (weights, weights * CENTRES))
    return np.where(mass > 0, sums / np.where(mass > 0, mass, 1), levels)


def cost(levels: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ (CENTRES - levels[cells(levels)]) ** 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fixed_point_of_lloyd_that_no_start_beats(bits: int) -> None:
    weights, rng = weights_of(bits), np.random.default_rng(0)
    levels = codebook.fit(weights, bits)
    assert levels.shape == (2**bits,) and (np.diff(levels) > 0).all()
    np.testing.assert_allclose(lloyd(levels, weights), levels, atol=1e-12)
    for _ in range(10):
        other = np.sort(rng.choice(CENTRES[weights > 0], 2**bits, replace=False))
        for _ in range(50):
            other = lloyd(other, weights)
        assert cost(other, weights) >= cost(levels, weights) * (1 - 1e-12)
    assert cost(np.linspace(-1, 1, 2**bits), weights) > 2 * cost(levels, weights)


def test_few_bins_are_levels_themselves() -> None:
    weights = np.zeros(BINS)
    weights[[3, 70]] = 1, 5
    levels = codebook.fit(weights, 2)
    assert len(levels) == 4 and set(CENTRES[[3, 70]]) <= set(levels) and (np.diff(levels) >= 0).all()
    assert np.isfinite(codebook.fit(np.zeros(BINS), 2)).all()


def test_matched_levels_have_the_mean_and_the_spread_of_the_values() -> None:
    counts = weights_of(7)
    levels = codebook.fit(weights_of(8), 2)
    read = codebook.matched(levels, counts)[cells(levels)]
    for x in (read, CENTRES):
        mean = np.average(x, weights=counts)
        spread = np.average((x - mean) ** 2, weights=counts)
        np.testing.assert_allclose(
            [mean, spread], [np.average(CENTRES, weights=counts), np.cov(CENTRES, aweights=counts, ddof=0)], rtol=1e-9
        )


def test_histograms_count_what_lies_inside() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.uniform(-1.5, 1.5, (30, 8)), rng.random((30, 8))
    counts, sums = codebook.histogram(x, weights)
    edges = np.linspace(-1, 1, BINS + 1)
    np.testing.assert_allclose(counts, np.histogram(x, edges)[0])
    np.testing.assert_allclose(sums, np.histogram(x, edges, weights=weights)[0])
    assert codebook.histogram(np.array([-1.0, 1.0]), np.ones(2))[0][[0, -1]].tolist() == [1, 1]


@pytest.mark.parametrize(("entries", "wanted"), [(4096, 21), (1024, 6), (192, 1)])
def test_outliers_at_either_end(entries: int, wanted: int) -> None:
    """As many as lie at or beyond the quantiles of 0.5 and 99.5 %: 21 of 4096, as the authors cap them."""
    x = np.random.default_rng(0).standard_normal(entries)
    assert codebook.outliers_of(entries) == (x >= np.quantile(x, 0.995)).sum() == wanted


def test_inner_ranges_leave_the_outermost_out() -> None:
    x = np.random.default_rng(0).standard_normal((3, 50))
    for count in (0, 2):
        middle, half = codebook.inner_range(x, count)
        order = np.sort(x)
        np.testing.assert_allclose(middle - half, order[:, count : count + 1])
        np.testing.assert_allclose(middle + half, order[:, 49 - count : 50 - count])
    assert codebook.normalise(np.full(3, 2.0), 2.0, 0.0).tolist() == [0, 0, 0]
