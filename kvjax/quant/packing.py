"""Codes packed into bytes: b bits cost b bits.

A width is a sum of power-of-two planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), low bits first. Within a plane of w
bits the packing is planar: of n codes along the axis, byte i holds codes i, i + n*w/8, i + 2*n*w/8, ..., so
that unpacking is one shift and one mask per slice of the axis and never interleaves.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, UInt8

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def pack(codes: UInt8[Array, "..."], bits: int, axis: int) -> tuple[UInt8[Array, "..."], ...]:
    """One byte array per plane; `axis` (negative, a multiple of 8 long) shrinks to w/8 of its length."""
    planes, low = [], 0
    for width in PLANES[bits]:
        part = (codes >> low) & ((1 << width) - 1)
        slices = jnp.split(part, 8 // width, axis=axis)
        word = slices[0]
        for j, piece in enumerate(slices[1:], 1):
            word = word | (piece << (j * width))
        planes.append(word)
        low += width
    return tuple(planes)


def unpack(planes: tuple[UInt8[Array, "..."], ...], bits: int, axis: int) -> UInt8[Array, "..."]:
    """The codes of `pack`."""
    codes, low = None, 0
    for width, word in zip(PLANES[bits], planes, strict=True):
        mask = (1 << width) - 1
        part = jnp.concatenate([(word >> (j * width)) & mask for j in range(8 // width)], axis=axis)
        codes = part if codes is None else codes | (part << low)
        low += width
    return codes
