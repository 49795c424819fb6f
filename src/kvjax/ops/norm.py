"""RMS normalisation, of layer inputs and of keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.ops.shards import head_mean


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


def normalize_heads(
    k: Float[Array, "B K n D"], weight: Float[Array, "D"] | Float[Array, "K D"], eps: float
) -> Float[Array, "B K n D"]:
    """Normalises keys over each head, or over all heads together, and scales them.

    Args:
      k: keys.
      weight: scale of each channel: of one head, where each is normalised alone, or of all heads.
      eps: added to the mean of squares.
    """
    if weight.ndim == 1:
        return normalize(k, eps) * weight
    wide = k.astype(jnp.promote_types(k.dtype, jnp.float32))
    square = head_mean(jnp.mean(wide * wide, -1, keepdims=True))
    return (wide * jax.lax.rsqrt(square + eps)).astype(k.dtype) * weight[:, None]
