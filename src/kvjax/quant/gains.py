"""Gains that even out a block before it is quantised: x = (scale * code + zero) * gain.

Where a channel's tokens share a scale (per "channel"), each token has a gain; where a token's channels do (per
"token"), each channel of a block has one. Either is a float16, and values are divided by what is stored.
R tokens of a block, D channels.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16

Gain = Literal["none", "norm", "balanced"]
PASSES = 8
FLOOR, CEILING = -0.3, 10.0  # bounds of the logarithm of a gain
STD = 1e-3, 1e3  # bounds of a standard deviation
Logs = tuple[Array, Array]  # logarithms of gains, and of what scales take up


def gains_of(
    x: Float[Array, "... R D"], counted: Bool[Array, "... R #D"], per: str, how: Gain
) -> Float16[Array, "... _ _"]:
    """Chooses the gains of blocks.

    Args:
      x: the blocks.
      counted: tokens that count.
      per: what shares a scale, see above.
      how: "norm", the root mean square of each token, for channels that share scales (OScaR, arXiv 2605.19660); or
        "balanced" (`balanced`).

    Returns:
      Gains [..., R, 1] per "channel" and [..., 1, D] per "token"; 1 where they would be 0 or not finite.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    gain = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True)) if how == "norm" else balanced(x, counted, per)
    gain = gain.astype(jnp.float16)
    return jnp.where(jnp.isfinite(gain) & (gain > 0), gain, 1)


def balanced(x: Float[Array, "... R D"], counted: Bool[Array, "... R #D"], per: str) -> Float[Array, "... _ _"]:
    """Evens out the standard deviations of tokens and of channels in turn, and gives the gains of one of the two.

    KVarN (arXiv 2606.03458), as its code has it: 8 passes in logarithms, of which the state counts that is best
    balanced. A gain there is at least exp(-0.3), so that little happens to blocks of small numbers. So blocks are
    divided by their root mean square first, which the authors do not do. What the other axis is divided by is not
    stored: its scales and zero points take it up.

    Args:
      x: the blocks, in float32 or wider.
      counted: tokens that count.
      per: what shares a scale.

    Returns:
      Gains [..., R, 1] of tokens per "channel", [..., 1, D] of channels per "token".
    """
    counted = jnp.broadcast_to(counted, x.shape)
    kept = jnp.where(counted, x, 0)
    size = jnp.sqrt(jnp.square(kept).sum((-2, -1), keepdims=True) / _count(counted, (-2, -1)))
    unit = kept / jnp.where(size == 0, 1, size)
    gained, scaled = (-1, -2) if per == "channel" else (-2, -1)  # what is within an entry of a gain, of a scale

    def std(logs: Logs, axis: int) -> Float[Array, "... _ _"]:
        return _std(unit * jnp.exp(-logs[0] - logs[1]), counted, axis)

    def imbalance(logs: Logs) -> Float[Array, "... 1 1"]:
        of_gains, of_scales = (
            _spread(std(logs, axis), counted.any(axis, keepdims=True)) for axis in (gained, scaled)
        )
        return of_gains + of_scales

    def grown(log: Float[Array, "... _ _"], std: Float[Array, "... _ _"]) -> Float[Array, "... _ _"]:
        return jnp.clip(log + jnp.log(jnp.clip(std, *STD)), FLOOR, CEILING)

    def step(_: int, state: tuple[Logs, Array, Array]) -> tuple[Logs, Array, Array]:
        (gain, scale), best, least = state
        gain = grown(gain, std((gain, scale), gained))
        scale = grown(scale, std((gain, scale), scaled))
        found = imbalance((gain, scale))
        better = found <= least
        return (gain, scale), jnp.where(better, gain, best), jnp.where(better, found, least)

    gain, scale = (jnp.zeros_like(unit.sum(axis, keepdims=True)) for axis in (gained, scaled))
    _, best, _ = jax.lax.fori_loop(0, PASSES, step, ((gain, scale), gain, imbalance((gain, scale))))
    return jnp.exp(best)


def _std(x: Float[Array, "... R D"], counted: Bool[Array, "... R D"], axis: int) -> Float[Array, "... _ _"]:
    """The standard deviation of the entries that count; 0 where there are fewer than two."""
    count = _count(counted, axis)
    off = jnp.where(counted, x - jnp.where(counted, x, 0).sum(axis, keepdims=True) / count, 0)
    return jnp.sqrt(jnp.square(off).sum(axis, keepdims=True) / jnp.maximum(count - 1, 1))


def _count(counted: Bool[Array, "... R D"], axis: int | tuple[int, int]) -> Float[Array, "... _ _"]:
    return jnp.maximum(counted.sum(axis, keepdims=True), 1)


def _spread(std: Float[Array, "... _ _"], there: Bool[Array, "... _ _"]) -> Float[Array, "... 1 1"]:
    """The largest of the standard deviations over the smallest."""
    most, least = jnp.where(there, std, 0).max((-2, -1), keepdims=True), jnp.where(there, std, jnp.inf)
    return most / jnp.maximum(least.min((-2, -1), keepdims=True), 1e-8)
