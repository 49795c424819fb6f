"""Predictors of keys and values by ridge regression, from what is read in the layer below (AQUA-KV, 2501.19392).

They are fitted layer by layer, from the first up. Their inputs are what is read of quantised keys and values, not
these themselves. n tokens, C channels of all kv heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.caches.aqua import FIRST_BITS, predict, read_back
from kvjax.caches.statistics import PREDICTED_BITS
from kvjax.ops.key_form import turn

RIDGE = 1e-3  # of the mean square of inputs


@jax.jit
def first_read(k: Float[Array, "n C"], v: Float[Array, "n C"]) -> Float[Array, "p n 2C"]:
    """What is read in the first layer, the same for all widths of those above."""
    read = jnp.concatenate([read_back(turn(x), FIRST_BITS) for x in (k, v)], -1)
    return jnp.broadcast_to(read, (len(PREDICTED_BITS), *read.shape))


@jax.jit
@jax.default_matmul_precision("highest")
def fit(
    k: Float[Array, "n C"], v: Float[Array, "n C"], below: Float[Array, "p n 2C"]
) -> tuple[Float[Array, "p C+1 C"], Float[Array, "p 2C+1 C"], Float[Array, "p n 2C"]]:
    """The predictors of a layer for each width.

    Args:
      k: its keys before RoPE.
      v: its values.
      below: what is read of both in the layer below.

    Returns:
      Those of keys, those of values, and what is read in this layer.
    """
    found = [_fit(k, v, rows, bits) for rows, bits in zip(below, PREDICTED_BITS, strict=True)]
    of_keys, of_values, read = (jnp.stack(each) for each in zip(*found, strict=True))
    return of_keys, of_values, read


def _fit(
    k: Float[Array, "n C"], v: Float[Array, "n C"], below: Float[Array, "n 2C"], bits: int
) -> tuple[Float[Array, "C+1 C"], Float[Array, "2C+1 C"], Float[Array, "n 2C"]]:
    keys, values = jnp.split(below, 2, -1)
    of_keys = ridge(keys, k)
    own = _read(k, predict(of_keys, keys), bits)
    of_values = ridge(jnp.concatenate([own, values], -1), v)
    return of_keys, of_values, jnp.concatenate([own, _read(v, predict(of_values, own, values), bits)], -1)


def _read(x: Float[Array, "n C"], predicted: Float[Array, "n C"] | float, bits: int) -> Float[Array, "n C"]:
    return predicted + read_back(turn(x - predicted), bits)


def ridge(x: Float[Array, "n i"], y: Float[Array, "n o"]) -> Float[Array, "i+1 o"]:
    """The weights, and in the last row what is added, that predict y from x."""
    x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], -1)
    square = x.T @ x
    return jnp.linalg.solve(square + RIDGE * jnp.diag(square).mean() * jnp.eye(len(square)), x.T @ y)
