"""Packed tensors of random values, for every kernel's tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import EXACT, Packed
from pallas_kernels.quantize_pack import quantize_pack

# The kernels that can be tested here, and whether in Pallas' interpreter: all on CPU, a device's own on the device.
INTERPRETED = {
    "cpu": {"native": False, "triton": True, "mosaic_tpu": True},
    "gpu": {"triton": False},
    "tpu": {"mosaic_tpu": False},
}[jax.default_backend()]


def values(seed: int, *shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(
    jax.jit,
    static_argnames=("bits", "per", "group", "pack"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def packed(x, bits: int, per: str, group: int, pack: int) -> Packed:
    """x [B, K, S, D] as it is stored."""
    batch, heads, tokens, channels = x.shape
    if bits == EXACT:
        return Packed((x,), None, None, EXACT, "token", 1, 1)
    count = tokens // pack
    blocks = x.reshape(batch, heads, count, pack, channels).swapaxes(1, 2).reshape(-1, heads, pack, channels)
    planes, *scales = quantize_pack(
        *(blocks, jnp.ones((batch * count, pack), bool)), bits=bits, per=per, group=group, implementation="reference"
    )

    def rows(a):
        """Blocks' rows below one another."""
        return a.reshape(batch, count, *a.shape[1:]).swapaxes(1, 2).reshape(batch, heads, -1, a.shape[-1])

    def columns(a):
        """Blocks' columns beside one another."""
        a = a.reshape(batch, count, *a.shape[1:])
        return a.transpose(0, 2, 3, 1, 4).reshape(batch, heads, a.shape[3], tokens)

    scale, zero = map(columns if per == "token" else rows, scales)
    return Packed(tuple(map(rows, planes)), scale, zero, bits, per, group, pack)
