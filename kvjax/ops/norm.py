"""The norm of layers and of keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize(x: Float[Array, "... n"], eps: float) -> Float[Array, "... n"]:
    """x / rms(x), the mean of squares in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)
