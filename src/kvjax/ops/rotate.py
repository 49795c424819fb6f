"""The rotation of RoPE, in HF's half-split convention."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(x: Float[Array, "... D"], cos: Float[Array, "... D"], sin: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rotates the pairs (x[i], x[i + D/2]).

    Args:
      x: vectors.
      cos: cosines of the angles, once for each half of D; the rotation runs in their dtype.
      sin: sines, likewise.

    Returns:
      The rotated vectors, in the dtype of x.
    """
    half = x.shape[-1] // 2
    wide = x.astype(cos.dtype)
    # (a, b) -> (-b, a) as a difference of padded halves: XLA vectorises this on CPU, but not a concatenation.
    rows = [(0, 0)] * (x.ndim - 1)
    turned = jnp.pad(wide[..., :half], [*rows, (half, 0)]) - jnp.pad(wide[..., half:], [*rows, (0, half)])
    return (wide * cos + turned * sin).astype(x.dtype)


def rotate_heads(
    x: Float[Array, "B T H D"], table: tuple[Float[Array, "B T D"], Float[Array, "B T D"]]
) -> Float[Array, "B T H D"]:
    """Rotates every head of a token by the token's angles.

    Args:
      x: queries or keys.
      table: cos and sin of each token, see `rotate`.

    Returns:
      The rotated queries or keys, in the dtype of x.
    """
    cos, sin = table
    return rotate(x, cos[:, :, None], sin[:, :, None])
