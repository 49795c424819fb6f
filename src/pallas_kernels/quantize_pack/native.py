"""Quantisation and packing on CPU, in C++: native.cc."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, UInt8

from pallas_kernels import native
from pallas_kernels.layout import PLANES
from pallas_kernels.quantize_pack import least_squares

SOURCE = Path(__file__).with_name("native.cc")


def quantize_pack(
    x: Float[Array, "N K R D"],
    counted: Bool[Array, "N R"],
    *,
    bits: int,
    per: str,
    group: int,
    fit: str = "minmax",
    interpret: bool = False,
) -> tuple[tuple[UInt8[Array, "N K _ D"], ...], Float16[Array, "N K _ _"], Float16[Array, "N K _ _"]]:
    """See `pallas_kernels.quantize_pack`."""
    if interpret:
        raise NotImplementedError("native code is not interpreted")
    target = native.register(SOURCE, "pallas_kernels_quantize_pack")
    blocks, heads, tokens, channels = x.shape
    groups = (channels // group, tokens) if per == "token" else (tokens // group, channels)
    scales = jax.ShapeDtypeStruct((blocks, heads, *groups), jnp.float16)
    planes = [
        jax.ShapeDtypeStruct((blocks, heads, tokens * width // 8, channels), jnp.uint8) for width in PLANES[bits]
    ]
    scale, zero, *packed = jax.ffi.ffi_call(target, [scales, scales, *planes])(
        *(x.astype(jnp.float32), counted),
        widths=np.asarray(PLANES[bits], np.int64),
        per_channel=np.int64(per == "channel"),
        group=np.int64(group),
        candidates=np.int64(least_squares.CANDIDATES if fit == "mse" else 0),
        refits=np.int64(least_squares.REFITS),
        parts=np.asarray(least_squares.parts_of(group), np.float32),
    )
    return tuple(packed), scale, zero
