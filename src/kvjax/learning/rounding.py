"""What a store reads back of values, with a gradient.

A code is c = round((x - z) / s). Its rounding has no gradient of use, so it is passed by as if nothing had been
rounded (straight-through), except at the ends of the range, where codes do not move. Scales s and zero points z keep
their gradient: they follow the least and the largest value of their group. The errors of a group are thus seen to
shrink with its range, which is what a transform can change (as in LSQ, arXiv 1902.08153).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.ops.store import EXACT, Format
from kvjax.quant import affine

still = jax.lax.stop_gradient


def rounded(x: Float[Array, "N W"], form: Format, counted: Bool[Array, "N"]) -> Float[Array, "N W"]:
    """What is read back of rows that are written in whole groups from the first on.

    Args:
      x: rows.
      form: how they are stored.
      counted: rows that count towards scales; what is read of others means nothing.

    Returns:
      The rows, in float32.
    """
    x = x.astype(jnp.float32)
    if form.bits == EXACT:
        return x
    rows = len(x)
    if form.per == "channel":
        x = jnp.pad(x, ((0, -rows % form.group), (0, 0)))
        counted = jnp.pad(counted, (0, -rows % form.group))
    axis = 1 if form.per == "channel" else 2
    split = lambda a: a.reshape(-1, form.group, a.shape[1]) if axis == 1 else a.reshape(len(a), -1, form.group)  # noqa: E731
    q = affine.quantize(still(x), form.bits, form.group_axis, form.group, counted[:, None], form.fit, form.scale_bits)
    groups, codes = split(x), split(q.codes).astype(jnp.float32)
    counts = split(jnp.broadcast_to(counted[:, None], x.shape))
    scale, zero = _moving(
        groups, counts, axis, *(jnp.expand_dims(a.astype(jnp.float32), axis) for a in (q.scale, q.zero))
    )
    exact = (groups - zero) / jnp.where(scale == 0, 1.0, scale)
    inside = (exact >= 0) & (exact <= 2**form.bits - 1)
    straight = jnp.where(inside, exact + still(codes - exact), codes)
    return (scale * straight + zero).reshape(x.shape)[:rows]


def _moving(
    groups: Float[Array, "a b c"], counts: Bool[Array, "a b c"], axis: int, scale: Array, zero: Array
) -> tuple[Array, Array]:
    """Scales and zero points with the gradient of their groups' ranges."""
    low, high = (
        f(jnp.where(counts, groups, end), axis, keepdims=True) for f, end in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    )
    width = high - low
    wide = jnp.isfinite(width) & (width > 0) & (scale > 0)
    low, width = jnp.where(wide, low, 0.0), jnp.where(wide, width, 1.0)
    step = width * still(scale / width)
    moving = low + step * still((zero - low) / jnp.where(wide, scale, 1.0))
    return jnp.where(wide, step, scale), jnp.where(wide, moving, zero)
