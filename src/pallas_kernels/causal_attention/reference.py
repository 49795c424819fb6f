"""Causal attention in plain float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.layout import MASKED, Attended


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Attended:
    """See `pallas_kernels.causal_attention`."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    back = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    visible = (back >= 0) & (back < (window or q.shape[1]))
    scores = jnp.where(visible, jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5, MASKED)
    output = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return output, jax.nn.logsumexp(scores, -1).swapaxes(1, 2)
