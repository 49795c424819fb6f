"""Attention of a few queries over packed keys and values, which are unpacked inside the kernel.

    output, lse = packed_attention(q, keys, values, start, stop, implementation="triton")

B batch, T queries, H heads, K kv heads, D head_dim, S allocated tokens.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import layout
from pallas_kernels.layout import Packed

IMPLEMENTATIONS = ("triton", "jax_triton", "mosaic_tpu", "native", "reference")


def packed_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int = 0,
    window: int | None = None,
    scale: float | None = None,
    implementation: str,
    interpret: bool = False,
) -> tuple[Float32[Array, "B T H D"], Float32[Array, "B T H"]]:
    """Softmax attention over the stored positions [first, stop) of each sequence.

    Query t of sequence b has position start[b] + t and sees the positions up to its own; of those, where `window` is
    given, only the last `window`. Query heads h*H/K to (h+1)*H/K - 1 read kv head h.

    Args:
      q: queries after RoPE, bfloat16 or float32; products run in this precision, sums in float32.
      keys: packed keys [B, K, S, D], after RoPE; may be exact (16 bits).
      values: packed values [B, K, S, V], of any width V; may be exact.
      start: position of the first query, per sequence.
      stop: the position after the last stored one that is read, per sequence; at most S. Under jit, where values are
        not known before the launch, more counts as S.
      first: the first stored position that is read (after the sinks, for example).
      window: sliding window in tokens; None where there is none.
      scale: factor of the scores; D**-0.5 where None.
      implementation: "triton" or "jax_triton" (GPU), "mosaic_tpu" (TPU), "native" (CPU), "reference" (slow).
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      The output and the log of the sum of exponentials of the scores. The latter serves to merge the output exactly
      with attention over other keys. A query that sees no key has output 0 and log-sum-exp `layout.MASKED`. What a
      query does not see never reaches its output, NaN included. The same call gives the same bits every time; with
      "mosaic_tpu", those of a sequence do not depend on the others either.

    Raises:
      ValueError: an argument whose shape, type or setting does not fit.
      NotImplementedError: the implementation cannot serve the call.
    """
    check(q, keys, values, start, stop, first, window)
    kernel = layout.implementation_of(__name__, implementation, IMPLEMENTATIONS)
    kernel = functools.partial(kernel, first=first, window=window, interpret=interpret)
    stop = layout.within(stop, keys.shape[2])
    return kernel(q, keys, values, start, stop, scale=q.shape[3] ** -0.5 if scale is None else scale)


def check(q, keys: Packed, values: Packed, start, stop, first: int, window: int | None) -> None:
    """Checks that the arguments of `packed_attention` fit together; raises ValueError where they do not."""
    layout.check("keys", keys)
    layout.check("values", values)
    if q.ndim != 4 or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q: {q.dtype}{list(q.shape)}; expected [B, T, H, D] in float32 or bfloat16")
    batch, heads, tokens, channels = keys.shape
    if (q.shape[0], q.shape[3]) != (batch, channels):
        raise ValueError(f"q: {list(q.shape)} does not fit keys of {batch} sequences and {channels} channels")
    if q.shape[2] % heads:
        raise ValueError(f"q: {q.shape[2]} heads; expected a multiple of the {heads} kv heads")
    if values.shape[:3] != (batch, heads, tokens):
        raise ValueError(f"values: {list(values.shape)}; expected {[batch, heads, tokens]} and any width, as in keys")
    layout.check_span(start, stop, first, window, batch, tokens)
