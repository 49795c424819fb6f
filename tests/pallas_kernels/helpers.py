"""Packed tensors of random values, for every kernel's tests, made by numpy alone."""

from __future__ import annotations

import functools
import importlib.util
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.testing import layers
from pallas_kernels import native
from pallas_kernels.layout import EXACT, PLANES, Packed

# The kernels that can be tested here, and whether in Pallas' interpreter: all on CPU, a device's own on the device.
INTERPRETED = {
    "cpu": {"native": False, "triton": True, "mosaic_tpu": True},
    "gpu": {"triton": False} | ({"jax_triton": False} if importlib.util.find_spec("jax_triton") else {}),
    "tpu": {"mosaic_tpu": False},
}[jax.default_backend()]

# Kernels are as exact without optimisation, and compile several times sooner.
QUICK = {name: value for name, value in layers.QUICK.items() if jax.default_backend() == "cpu" or "cpu" not in name}

WITHOUT = ("-mno-amx-int8", "-mno-avx512f")  # the matrix unit; AVX-512, which leaves AVX2


@functools.cache
def native_without(flag: str, source, symbol: str) -> str:
    """The target of a C++ kernel as it is built for a CPU without some instructions."""
    with pytest.MonkeyPatch.context() as patch:
        if platform.machine() == "x86_64":
            patch.setattr(native, "FLAGS", (*native.FLAGS, flag))
        library = native._load(source)
    jax.ffi.register_ffi_target(symbol + flag, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return symbol + flag


def values(seed: int, *shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed(x, bits: int, per: str, group: int, pack: int) -> Packed:
    """x [B, K, S, D] as it is stored."""
    return _both(np.asarray(x, np.float32).tobytes(), x.shape, bits, per, group, pack)[0]


def stored(x, bits: int, per: str, group: int, pack: int) -> Packed:
    """The values that `packed` holds, unquantised: what references may read."""
    return _both(np.asarray(x, np.float32).tobytes(), x.shape, bits, per, group, pack)[1]


@functools.lru_cache(maxsize=8)
def _both(data: bytes, shape, bits: int, per: str, group: int, pack: int) -> tuple[Packed, Packed]:
    x = np.frombuffer(data, np.float32).reshape(shape)
    if bits == EXACT:
        whole = Packed((jnp.asarray(x),), None, None, EXACT, "token", 1, 1)
        return whole, whole
    batch, heads, tokens, channels = shape
    axis = 4 if per == "token" else 3
    split = (tokens, channels // group, group) if per == "token" else (tokens // group, group, channels)
    grouped = x.reshape(batch, heads, *split)
    low, high = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
    scale, zero = ((high - low) / np.float32(2**bits - 1)).astype(np.float16), low.astype(np.float16)
    s, z = scale.astype(np.float32), zero.astype(np.float32)
    codes = np.clip(np.round((grouped - z) / s), 0, 2**bits - 1)
    exact = (codes * s + z).reshape(shape)
    blocks = codes.astype(np.uint8).reshape(batch, heads, tokens // pack, pack, channels)
    planes, below = [], 0
    for width in PLANES[bits]:
        part = (blocks >> below) & ((1 << width) - 1)
        word = np.zeros((batch, heads, tokens // pack, pack * width // 8, channels), np.uint8)
        for shift, rows in enumerate(np.split(part, 8 // width, 3)):
            word |= rows << (shift * width)
        planes.append(jnp.asarray(word.reshape(batch, heads, -1, channels)))
        below += width
    scales = [a.squeeze(axis).swapaxes(2, 3) if per == "token" else a.squeeze(axis) for a in (scale, zero)]
    return Packed(tuple(planes), *map(jnp.asarray, scales), bits, per, group, pack), stored_as(exact)


def stored_as(x) -> Packed:
    return Packed((jnp.asarray(x),), None, None, EXACT, "token", 1, 1)
