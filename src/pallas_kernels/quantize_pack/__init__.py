"""Quantisation and packing of blocks of values: minimum, maximum, scale, codes and bytes in one pass.

    planes, scale, zero = quantize_pack(x, counted, bits=4, per="channel", group=32, implementation="triton")

N packing blocks, K kv heads, R tokens of a block, D channels.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, UInt8

from pallas_kernels import layout

FITS = ("minmax", "mse")  # how scales and zero points are chosen
IMPLEMENTATIONS = ("triton", "mosaic_tpu", "native", "reference")
Planes = tuple[UInt8[Array, "N K _ D"], ...]


def quantize_pack(
    x: Float[Array, "N K R D"],
    counted: Bool[Array, "N R"],
    *,
    bits: int,
    per: str,
    group: int,
    fit: str = "minmax",
    implementation: str,
    interpret: bool = False,
) -> tuple[Planes, Float16[Array, "N K _ _"], Float16[Array, "N K _ _"]]:
    """Quantises N packing blocks of R tokens.

    z = min and s = (max - min) / (2^b - 1) of each group in float32, rounded to float16 first; then
    code = clip(round((x - z) / s), 0, 2^b - 1), half to even and by true division; s = 0 gives code 0. A group that
    does not fit float16 gets NaN for scale and zero point. fit="mse" searches s and z instead (least_squares.py).

    Args:
      x: values, cast to float32.
      counted: tokens that count towards minima and maxima; a group with none has scale and zero point 0.
      bits: code width.
      per: "token" or "channel", as in `layout.Packed`.
      group: elements of a group, as in `layout.Packed`.
      fit: one of `FITS`.
      implementation: "triton" (GPU), "mosaic_tpu" (TPU), "native" (CPU, in C++) or "reference" (slow).
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      Planes [N, K, R*w/8, D], scales and zero points [N, K, D/group, R] per token or [N, K, R/group, D] per channel.

    Raises:
      ValueError: an argument whose shape, type or setting does not fit.
      NotImplementedError: the implementation cannot serve the call.
    """
    if bits not in layout.PLANES:
        raise ValueError(f"bits: {bits}; expected one of {', '.join(map(str, layout.PLANES))}")
    if per not in ("token", "channel"):
        raise ValueError(f"per: {per!r}; expected token or channel")
    if fit not in FITS:
        raise ValueError(f"fit: {fit!r}; expected {' or '.join(FITS)}")
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: {x.dtype}{list(x.shape)}; expected floats [N, K, R, D]")
    if counted.shape != (x.shape[0], x.shape[2]) or counted.dtype != jnp.bool_:
        raise ValueError(f"counted: {counted.dtype}{list(counted.shape)}; expected bool {[x.shape[0], x.shape[2]]}")
    if x.shape[2] % 8:
        raise ValueError(f"x: blocks of {x.shape[2]} tokens; expected a multiple of 8")
    size = x.shape[3] if per == "token" else x.shape[2]
    if group < 1 or size % group:
        raise ValueError(f"group: {group} does not divide the {size} {'channels' if per == 'token' else 'tokens'}")
    kernel = layout.implementation_of(__name__, implementation, IMPLEMENTATIONS)
    return kernel(x, counted, bits=bits, per=per, group=group, fit=fit, interpret=interpret)
