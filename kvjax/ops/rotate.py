"""The rotation of RoPE, in HF's half-split convention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rotate(x: Float[Array, "... D"], cos: Float[Array, "... D"], sin: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rotates the pairs (x[i], x[i + D/2]), whose angle stands twice in cos and sin, in their precision."""
    half = x.shape[-1] // 2
    # (a, b) -> (-b, a) as a product with a signed permutation, exact at the highest precision: XLA's CPU backend
    # does not vectorise slices and concatenations along channels.
    turn = np.zeros((2 * half, 2 * half), np.float32)
    turn[half + np.arange(half), np.arange(half)] = -1
    turn[np.arange(half), half + np.arange(half)] = 1
    wide = x.astype(cos.dtype)
    turned = jnp.matmul(wide, turn.astype(cos.dtype), precision=jax.lax.Precision.HIGHEST)
    return (wide * cos + turned * sin).astype(x.dtype)
