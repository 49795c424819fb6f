"""The rotation of RoPE, in HF's half-split convention."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(x: Float[Array, "... D"], cos: Float[Array, "... D"], sin: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rotates the pairs (x[i], x[i + D/2]), whose angle stands twice in cos and sin, in their precision."""
    half = x.shape[-1] // 2
    wide = x.astype(cos.dtype)
    # (a, b) -> (-b, a) as a difference of padded halves: XLA vectorises it on CPU, not a concatenation.
    rows = [(0, 0)] * (x.ndim - 1)
    turned = jnp.pad(wide[..., :half], [*rows, (half, 0)]) - jnp.pad(wide[..., half:], [*rows, (0, half)])
    return (wide * cos + turned * sin).astype(x.dtype)


def rotate_heads(
    x: Float[Array, "B T H D"], table: tuple[Float[Array, "B T D"], Float[Array, "B T D"]]
) -> Float[Array, "B T H D"]:
    """Rotates every head of a token by the token's cos and sin."""
    cos, sin = table
    return rotate(x, cos[:, :, None], sin[:, :, None])
