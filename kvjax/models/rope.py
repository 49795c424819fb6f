"""Rotary position embedding, in HF's half-split convention, with linear and llama3 scaling."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.models.config import RopeConfig


@struct.dataclass
class Rope:
    """The inverse frequencies of one model's RoPE."""

    inv_freq: Float[np.ndarray, "half"]

    def table(self, positions: Int[Array, "..."], dtype) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
        """Computes cos and sin of position * inv_freq.

        Args:
          positions: positions of tokens.
          dtype: dtype of the angles and of the results, widened to at least float32.

        Returns:
          cos and sin, each angle once per half of D.
        """
        dtype = jnp.promote_types(dtype, jnp.float32)
        angle = positions[..., None].astype(dtype) * jnp.tile(jnp.asarray(self.inv_freq, dtype), 2)
        return jnp.cos(angle), jnp.sin(angle)


def make_rope(config: RopeConfig, head_dim: int) -> Rope:
    """Computes the frequencies of a config.

    Args:
      config: theta and scaling.
      head_dim: channels D of a head.

    Returns:
      The rope, with frequencies in float64: they are rounded where they are used.
    """
    inv_freq = config.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if config.scaling == "linear":
        inv_freq = inv_freq / config.factor
    elif config.scaling == "llama3":
        inv_freq = _llama3(inv_freq, config)
    return Rope(inv_freq)


def _llama3(inv_freq: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Llama 3.1's scaling: divides long wavelengths' frequencies by `factor`, keeps short ones, blends in between."""
    wavelength = 2 * math.pi / inv_freq
    old = config.original_max_positions
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inv_freq / config.factor + blend * inv_freq
