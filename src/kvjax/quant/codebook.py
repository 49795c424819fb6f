"""Codebooks that are learned: 2^b levels for values normalised to [-1, 1] (KVQuant, arXiv 2401.18079, section 3.3).

What is learned from is a histogram of normalised values, of `BINS` equal parts of [-1, 1].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BINS = 512
CENTRES = (np.arange(BINS) + 0.5) * 2 / BINS - 1
TAIL = 0.005  # share of entries at either end that count as outliers


def outliers_of(entries: int) -> int:
    """How many of a vector's entries lie at or beyond the `TAIL` quantile at either end."""
    return int(TAIL * (entries - 1)) + 1


def inner_range(x: Float[Array, "... n"], outliers: int) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Middle and half width of the range of vectors without so many outliers at either end."""
    low, high = (-jax.lax.top_k(-x, outliers + 1)[0][..., -1:], jax.lax.top_k(x, outliers + 1)[0][..., -1:])
    return (low + high) / 2, (high - low) / 2


def normalise(x: Float[Array, "..."], middle: Float[Array, "..."], half: Float[Array, "..."]) -> Float[Array, "..."]:
    """Values whose range becomes [-1, 1]; 0 where the range is one number."""
    return (x - middle) / jnp.where(half > 0, half, jnp.inf)


def nearest(x: Float[Array, "..."], levels: Float[Array, "n"]) -> UInt8[Array, "..."]:
    """The number of the level that is nearest to each value; levels ascend."""
    return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, x).astype(jnp.uint8)


def histogram(x: Float[np.ndarray, "..."], weights: Float[np.ndarray, "..."]) -> Float[np.ndarray, "2 bins"]:
    """How many of the values in [-1, 1] lie in each bin, and the sum of their weights."""
    inside = np.abs(x) <= 1 + 1e-6  # the ends themselves, rounded
    at = np.clip((x[inside] + 1) * BINS / 2, 0, BINS - 1).astype(np.int64)
    return np.stack([np.bincount(at, each, BINS) for each in (np.ones(len(at)), weights[inside])])


def fit(weights: Float[np.ndarray, "bins"], bits: int) -> Float[np.ndarray, "n"]:
    """The levels with the least weighted squared error of all: k-means in one dimension, by dynamic programming.

    The authors run Lloyd's algorithm from a random start, which ends in one of its fixed points; this is the best.

    Args:
      weights: of each bin; any scale.
      bits: width of a code.

    Returns:
      The levels, ascending.
    """
    count, kept = 2**bits, weights > 0
    x, w = CENTRES[kept], weights[kept] / max(weights.sum(), np.finfo(np.float64).tiny)
    if len(x) <= count:
        return np.sort(np.concatenate([x, np.linspace(-1, 1, count - len(x))]))
    mass, first, second = (np.concatenate([[0], np.cumsum(w * x**power)]) for power in range(3))
    of = lambda sums: sums[None, :] - sums[:, None]  # noqa: E731  # entry [i, j]: of bins i to j - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = of(second) - of(first) ** 2 / of(mass)
    cost = np.where(np.triu(np.ones_like(cost, bool), 1), cost, np.inf)
    best, starts = cost[0], []
    for _ in range(count - 1):
        total = best[:, None] + cost
        starts.append(total.argmin(0))
        best = total.min(0)
    ends = [len(x)]
    for start in reversed(starts):
        ends.append(start[ends[-1]])
    edges = np.array([0, *reversed(ends)])
    return np.diff(first[edges]) / np.diff(mass[edges])


def matched(levels: Float[np.ndarray, "n"], counts: Float[np.ndarray, "bins"]) -> Float[np.ndarray, "n"]:
    """The levels that are read for these: quantised values get the mean and the spread of the values (Q-Norm)."""
    share = counts / max(counts.sum(), 1)
    coded = levels[np.asarray(nearest(jnp.asarray(CENTRES), jnp.asarray(levels)))]
    (mean, spread), (coded_mean, coded_spread) = (_moments(x, share) for x in (CENTRES, coded))
    return (levels - coded_mean) * (spread / coded_spread if coded_spread else 1) + mean


def _moments(x: Float[np.ndarray, "bins"], share: Float[np.ndarray, "bins"]) -> tuple[float, float]:
    mean = share @ x
    return mean, np.sqrt(share @ (x - mean) ** 2)
