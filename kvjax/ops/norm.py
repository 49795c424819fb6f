"""RMS normalisation, of layer inputs and of keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize(x: Float[Array, "... n"], eps: float) -> Float[Array, "... n"]:
    """Divides x by its root mean square over the last axis.

    Args:
      x: values.
      eps: added to the mean of squares, which is taken in float32 or wider.

    Returns:
      x / rms(x), in the dtype of x.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)
