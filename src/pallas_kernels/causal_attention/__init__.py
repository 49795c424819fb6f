"""Attention of a chunk's tokens to one another, each to itself and those before it, as a prompt is read.

    output, lse = causal_attention(q, k, v, implementation="splash")

B batch, T tokens, H heads, K kv heads, D head_dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import layout
from pallas_kernels.layout import Attended

IMPLEMENTATIONS = ("splash", "reference")


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    window: int | None = None,
    implementation: str,
    interpret: bool = False,
) -> Attended:
    """Softmax attention of token t to the tokens up to t; of those, where `window` is given, to the last `window`.

    Query heads h*H/K to (h+1)*H/K - 1 read kv head h. Scores are divided by the root of D.

    Args:
      q: queries after RoPE.
      k: keys after RoPE.
      v: values.
      window: sliding window in tokens; None where there is none.
      implementation: "splash" (TPU) or "reference" (slow).
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      The output and the log of the sum of exponentials of the scores, in float32. A key or value that is not finite
      gives NaN to the queries that see its token, and to no other.

    Raises:
      ValueError: an argument whose shape or setting does not fit.
      NotImplementedError: the implementation cannot serve the call.
    """
    _check(q, k, v, window)
    kernel = layout.implementation_of(__name__, implementation, IMPLEMENTATIONS)
    finite = (jnp.isfinite(k) & jnp.isfinite(v)).all(-1)  # 0 times NaN is NaN, and kernels weigh what is hidden by 0
    k, v = (jnp.where(finite[..., None], a, 0) for a in (k, v))
    output, lse = kernel(q, k, v, window=window, interpret=interpret)
    spoiled = jnp.repeat(_sees(~finite, window), q.shape[2] // k.shape[2], 2)
    return jnp.where(spoiled[..., None], jnp.nan, output), jnp.where(spoiled, jnp.nan, lse)


def _sees(marked: Bool[Array, "B T K"], window: int | None) -> Bool[Array, "B T K"]:
    """Whether a token sees one that is marked."""
    count = jnp.cumsum(marked, 1)
    if window is None or window >= marked.shape[1]:
        return count > 0
    return count > jnp.pad(count, ((0, 0), (window, 0), (0, 0)))[:, : marked.shape[1]]


def _check(q: Array, k: Array, v: Array, window: int | None) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected four axes, k as v")
    if (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {list(q.shape)} does not fit k {list(k.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}; expected at least 1")
