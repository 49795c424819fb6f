"""The best quantisers of normal numbers, which the channels of a turned vector nearly are.

Computed in numpy, in float64, once per width. Levels and steps are for numbers of mean 0 and variance 1.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import ndtr

NEAR = 1e-12  # a change of levels after which their search ends


@functools.cache
def lloyd_max(bits: int) -> Float[np.ndarray, "L"]:
    """Finds the 2^b levels with the least squared error: each is the mean of the numbers that are nearest to it.

    Args:
      bits: code width b.

    Returns:
      The levels in rising order, symmetric about 0 (Lloyd 1957, Max 1960).
    """
    levels, change = np.linspace(-2, 2, 2**bits), np.inf
    while change > NEAR:
        mass, first = _cells((levels[1:] + levels[:-1]) / 2)
        better = (first / mass - (first / mass)[::-1]) / 2
        levels, change = better, np.abs(better - levels).max()
    return levels


@functools.cache
def uniform_step(bits: int) -> float:
    """Finds the distance of 2^b evenly spaced levels, symmetric about 0, with the least squared error.

    Args:
      bits: code width b.
    """
    places = np.arange(2**bits) - (2**bits - 1) / 2

    def slope(step: float) -> float:
        mass, first = _cells(step * (places[1:] + places[:-1]) / 2)
        return step * (places**2 * mass).sum() - (places * first).sum()

    return brentq(slope, 1 / 2**bits, 4)


def _cells(edges: Float[np.ndarray, "n"]) -> tuple[Float[np.ndarray, "n+1"], Float[np.ndarray, "n+1"]]:
    """The probability of each cell between the edges, and the integral of x over it."""
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    return np.diff(ndtr(edges), prepend=0, append=1), -np.diff(density, prepend=0, append=0)
