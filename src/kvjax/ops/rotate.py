"""The rotation of RoPE, in HF's half-split convention."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _parts(step: float, bits: int) -> tuple[np.float32, ...]:
    """A number as a sum of two of so many bits and a rest: whole multiples of the two are exact in float32."""
    parts = []
    for _ in range(2):
        fraction, exponent = np.frexp(step)
        parts.append(np.ldexp(np.trunc(np.ldexp(fraction, bits)), exponent - bits))
        step -= parts[-1]
    return tuple(map(np.float32, (*parts, step)))


_FAR, _QUARTER = 512 * np.pi, np.pi / 2


def cos_sin(angle: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Cosines and sines, in the dtype of the angles.

    In float32 to 2e-7 for angles up to 2^21, by arithmetic that compilers vectorise: XLA on CPU calls a scalar
    function for each angle. Multiples of 512 pi and then of pi / 2 are taken away (Cody and Waite), and the rest goes
    through the polynomials of Cephes' sinf.c.
    """
    if angle.dtype != jnp.float32:
        return jnp.cos(angle), jnp.sin(angle)
    far, (high, middle, low) = jnp.round(angle * np.float32(1 / _FAR)), _parts(_FAR, 12)
    rest, late = angle - far * high - far * middle, far * low  # what is late would be lost in so large a number
    quarters = jnp.round((rest - late) * np.float32(1 / _QUARTER))
    high, middle, low = _parts(_QUARTER, 13)
    rest = rest - quarters * high - quarters * middle - (quarters * low + late)
    square = rest * rest
    sine = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    series = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1 - square * 0.5 + square * square * series
    turn = quarters.astype(jnp.int32) & 3
    odd = (turn & 1) == 1
    cosine, sine = jnp.where(odd, sine, cosine), jnp.where(odd, cosine, sine)
    return jnp.where((turn == 1) | (turn == 2), -cosine, cosine), jnp.where(turn >= 2, -sine, sine)


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
