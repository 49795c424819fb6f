"""The ranges of a layer's keys and values, and where in them the numbers lie that errors cost most."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.quant.codebook import TAIL, histogram, inner_range, normalise, outliers_of

PERCENTILES = ((0.0, 100.0), (100 * TAIL, 100 - 100 * TAIL))  # of all, of the inner 99 %


def ranges_of(
    k: Float[np.ndarray, "n K d"],
    v: Float[np.ndarray, "n K d"],
    key_cost: Float[np.ndarray, "n K d"],
    value_cost: Float[np.ndarray, "n K d"],
) -> dict[str, Any]:
    """What `Statistics` has of ranges.

    Args:
      k: keys before RoPE of n tokens.
      v: their values.
      key_cost: the mean square of the gradients with respect to keys.
      value_cost: likewise of values.
    """
    ends = np.stack([np.percentile(k, ends, 0) for ends in PERCENTILES])
    count, flat = len(k), v.reshape(len(v), -1)
    of_keys = [_normal(k, (low + high) / 2, (high - low) / 2) for low, high in ends]
    skipped = 0, outliers_of(flat.shape[1])
    of_values = [_normal(flat, *jax.device_get(_inner_range(flat, outliers))) for outliers in skipped]
    costs = value_cost.reshape(flat.shape)
    return {
        "key_ends": ends,
        "key_bins": np.stack([histogram(x, key_cost) for x in of_keys]) / count,
        "value_bins": np.stack([histogram(x, costs) for x in of_values]) / count,
    }


_inner_range = jax.jit(inner_range, static_argnums=1)


def _normal(x: np.ndarray, middle: np.ndarray, half: np.ndarray) -> np.ndarray:
    return np.asarray(normalise(*map(jnp.asarray, (x, middle, half))))
