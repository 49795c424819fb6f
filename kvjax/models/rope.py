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
    """Inverse frequencies of one model; `apply` rotates queries or keys to their positions."""

    inv_freq: Float[Array, "half"]

    def apply(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Rotates the pairs (x[i], x[i + D/2]) by position * inv_freq[i]. Angles in float32 or wider."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        angle = positions[..., None, None].astype(dtype) * self.inv_freq.astype(dtype)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x.astype(dtype), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def make_rope(config: RopeConfig, head_dim: int) -> Rope:
    """The rope of a config. Frequencies are rounded to float32 in every dtype, as in the checkpoints' code."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1.0) / np.power(np.float32(config.theta), exponent, dtype=np.float32)
    if config.scaling == "linear":
        inv_freq = inv_freq / np.float32(config.factor)
    elif config.scaling == "llama3":
        inv_freq = _llama3(inv_freq, config)
    return Rope(inv_freq.astype(np.float32))


def _llama3(inv_freq: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, between them a blend."""
    wavelength = 2 * math.pi / inv_freq
    old = config.original_max_positions
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inv_freq / config.factor + blend * inv_freq
