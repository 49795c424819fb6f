"""Attention of a few queries over stored layer inputs or their latents: keys are rebuilt block by block.

    output, lse = remat_attention(q, keys, values, rebuild, start, stop, implementation="triton")
    acc = reconstruct(acc, delta, up, until, implementation="triton")  # XQuant-CL's accumulator, in place

Values are not rebuilt: softmax(..) (X̂ R_v) = (softmax(..) X̂) R_v, and the caller multiplies by R_v. B batch,
T queries, H heads, K kv heads, D head_dim, S allocated tokens, G latent heads (1, or K), r and s widths of the rows
of keys and of values, M model_dim.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import layout
from pallas_kernels.layout import Packed
from pallas_kernels.remat_attention.weights import Rebuild

IMPLEMENTATIONS = ("triton", "mosaic_tpu", "native", "reference")


def remat_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    rebuild: Rebuild,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int = 0,
    window: int | None = None,
    scale: float | None = None,
    implementation: str,
    interpret: bool = False,
) -> tuple[Float32[Array, "B T H s"], Float32[Array, "B T H"]]:
    """Softmax attention over the stored positions [first, stop), with keys rebuilt from stored rows.

    Positions, window and heads are as in `packed_attention`.

    Args:
      q: queries after RoPE, bfloat16 or float32.
      keys: rows [B, G, S, r] from which keys are rebuilt; may be exact (16 bits).
      values: rows [B, G, S, s] that are weighted by the probabilities; may be exact. Where it is the same object as
        `keys`, rows are read only once.
      rebuild: the weights and tables that turn rows into keys.
      start: position of the first query, per sequence.
      stop: the position after the last stored one that is read, per sequence; at most S, as in `packed_attention`.
      first: the first stored position that is read.
      window: sliding window in tokens; None where there is none.
      scale: factor of the scores; D**-0.5 where None.
      implementation: "triton" (GPU), "mosaic_tpu" (TPU), "native" (CPU) or "reference" (slow).
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      The weighted rows of `values` per query head, and the log of the sum of exponentials; see `packed_attention`.

    Raises:
      ValueError: an argument whose shape, type or setting does not fit.
      NotImplementedError: the implementation cannot serve the call.
    """
    check(q, keys, values, rebuild, start, stop, first, window)
    kernel = layout.implementation_of(__name__, implementation, IMPLEMENTATIONS)
    kernel = functools.partial(kernel, first=first, window=window, interpret=interpret)
    stop = layout.within(stop, keys.shape[2])
    return kernel(q, keys, values, rebuild, start, stop, scale=q.shape[3] ** -0.5 if scale is None else scale)


def reconstruct(
    below: Float[Array, "B S M"],
    delta: Packed,
    up: Float[Array, "r M"],
    until: Int[Array, "B"],
    *,
    implementation: str,
    interpret: bool = False,
) -> Float[Array, "B S M"]:
    """Reconstructs X̂ of a layer that stores deltas: below + dequantised delta @ up.

    The result is written in place of `below`.

    Args:
      below: X̂ of the layer below.
      delta: stored deltas [B, 1, n, r] with n <= S.
      up: weight that turns a delta into a difference of layer inputs.
      until: per sequence, the position below which X̂ is reconstructed.
      implementation: "triton" (GPU), "mosaic_tpu" (TPU), "native" (CPU) or "reference" (slow).
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      X̂ of this layer at positions under `until`, `below` elsewhere.

    Raises:
      ValueError: an argument whose shape or type does not fit.
      NotImplementedError: the implementation cannot serve the call.
    """
    layout.check("delta", delta)
    batch, heads, tokens, width = delta.shape
    if below.ndim != 3 or below.shape[0] != batch or below.shape[1] < tokens or heads != 1:
        raise ValueError(f"below: {list(below.shape)} does not fit a delta of {list(delta.shape)}")
    if up.shape != (width, below.shape[2]):
        raise ValueError(f"up: {list(up.shape)}; expected {[width, below.shape[2]]}")
    if until.shape != (batch,):
        raise ValueError(f"until: {list(until.shape)}; expected [{batch}]")
    layout.check_bound("until", until, tokens)
    kernel = layout.implementation_of(__name__, implementation, IMPLEMENTATIONS, "reconstruct")
    return kernel(below, delta, up, layout.within(until, tokens), interpret=interpret)


def check(q, keys: Packed, values: Packed, rebuild: Rebuild, start, stop, first: int, window: int | None) -> None:
    """Checks that the arguments of `remat_attention` fit together; raises ValueError where they do not."""
    layout.check("keys", keys)
    layout.check("values", values)
    if q.ndim != 4 or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q: {q.dtype}{list(q.shape)}; expected [B, T, H, D] in float32 or bfloat16")
    batch, groups, tokens, width = keys.shape
    head_dim = q.shape[3]
    if q.shape[0] != batch or values.shape[:3] != (batch, groups, tokens):
        raise ValueError(
            f"values: {list(values.shape)} do not fit keys of {list(keys.shape)} and q of {list(q.shape)}"
        )
    up = rebuild.up
    if up.ndim != 3 or up.shape[:2] != (groups, width) or up.shape[2] % head_dim:
        raise ValueError(f"rebuild.up: {list(up.shape)}; expected {[groups, width]} and a multiple of {head_dim}")
    kv_heads = rebuild.kv_heads(head_dim)
    if groups not in (1, kv_heads) or q.shape[2] % kv_heads:
        raise ValueError(
            f"keys: {groups} heads; expected 1 or the {kv_heads} kv heads, which divide q's {q.shape[2]}"
        )
    for name, table in (("cos", rebuild.cos), ("sin", rebuild.sin)):
        if table.ndim != 2 or table.shape[0] < tokens or table.shape[1] != head_dim:
            raise ValueError(f"rebuild.{name}: {list(table.shape)}; expected at least {[tokens, head_dim]}")
    if rebuild.bias is not None and rebuild.bias.shape != (kv_heads, head_dim):
        raise ValueError(f"rebuild.bias: {list(rebuild.bias.shape)}; expected {[kv_heads, head_dim]}")
    if rebuild.norm is not None and rebuild.norm.shape != (head_dim,):
        raise ValueError(f"rebuild.norm: {list(rebuild.norm.shape)}; expected [{head_dim}]")
    layout.check_span(start, stop, first, window, batch, tokens)
