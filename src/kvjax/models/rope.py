"""Rotary position embedding, in HF's half-split convention, with the scalings of its frequencies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.models.config import RopeConfig
from kvjax.ops.rotate import cos_sin


@struct.dataclass
class Rope:
    """The inverse frequencies of a layer's RoPE, and what its cosines and sines are multiplied by."""

    inv_freq: Float[np.ndarray, "half"]
    factor: Float[np.ndarray, "half"]

    def table(self, positions: Int[Array, "..."], dtype) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
        """Computes cos and sin of position * inv_freq, times the factor.

        Args:
          positions: positions of tokens.
          dtype: dtype of the angles and of the results, widened to at least float32.

        Returns:
          cos and sin, each angle once per half of D.
        """
        dtype = jnp.promote_types(dtype, jnp.float32)
        inv_freq, factor = (jnp.asarray(a, dtype) for a in (self.inv_freq, self.factor))
        angle = positions[..., None].astype(dtype) * inv_freq
        both = (jnp.concatenate([half * factor] * 2, -1) for half in cos_sin(angle))
        # XLA would fuse them into all that reads them, and compute them for every head and every reader.
        return jax.lax.optimization_barrier(tuple(both))


def make_rope(config: RopeConfig, head_dim: int, length: int = 0) -> Rope:
    """Computes the frequencies of a config.

    Args:
      config: theta and scaling.
      head_dim: channels D of a head. Where the config turns fewer, the other pairs have frequency 0.
      length: tokens of the longest text that is read: `longrope` and `dynamic` depend on it, as in transformers, but
        here it stays the same while a text grows. So cached keys and new queries have the same frequencies.

    Returns:
      The rope, with frequencies in float64: they are rounded where they are used.
    """
    channels = head_dim if config.channels is None else config.channels
    inv_freq = _inverse_frequencies(config, channels, length)
    rest = 0, (head_dim - channels) // 2
    factor = np.full(channels // 2, config.attention_factor)
    return Rope(np.pad(inv_freq, rest), np.pad(factor, rest, constant_values=1))


def reach(config: RopeConfig, length: int) -> int:
    """What the frequencies depend on, of the longest text's length: nothing but in `longrope` and `dynamic`."""
    old = config.original_max_positions
    return {"longrope": int(length > old), "dynamic": max(length, old)}.get(config.scaling, 0)


def _inverse_frequencies(config: RopeConfig, channels: int, length: int) -> Float[np.ndarray, "half"]:
    theta, old = config.theta, config.original_max_positions
    if config.scaling == "dynamic" and length > old:
        # NTK-aware scaling: a larger theta, so that the slowest pair turns as far as it did in the original length.
        theta *= (config.factor * length / old - (config.factor - 1)) ** (channels / (channels - 2))
    inv_freq = theta ** (-np.arange(0, channels, 2) / max(channels, 1))
    if config.scaling == "linear":
        return inv_freq / config.factor
    if config.scaling == "llama3":
        return _llama3(inv_freq, config)
    if config.scaling == "yarn":
        return _yarn(inv_freq, config)
    if config.scaling == "longrope":
        return inv_freq / np.array(config.long_factors if length > old else config.short_factors)
    return inv_freq


def _llama3(inv_freq: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Llama 3.1's scaling: divides long wavelengths' frequencies by `factor`, keeps short ones, blends in between."""
    wavelength = 2 * math.pi / inv_freq
    old = config.original_max_positions
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inv_freq / config.factor + blend * inv_freq


def _yarn(inv_freq: np.ndarray, config: RopeConfig) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2).

    Divides by `factor` the frequencies of pairs that turn `beta_slow` times or less in the original length, keeps
    those that turn `beta_fast` times or more, and blends in between.
    """
    channels = 2 * len(inv_freq)

    def pair(turns: float) -> float:
        """Which pair, as a real number, turns so many times."""
        length = config.original_max_positions / (2 * math.pi * turns)
        return channels * math.log(length) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    ramp = np.clip((np.arange(len(inv_freq)) - low) / (high - low or 1e-3), 0.0, 1.0)
    return ramp * inv_freq / config.factor + (1 - ramp) * inv_freq
