"""Keys and values as small floats: the FP8 and NVFP4 caches that vLLM, TensorRT-LLM and ModelOpt serve.

FP8 is e4m3, 8 bits an element. NVFP4 is e2m1 with an e4m3 scale for every 16 channels, the largest magnitude over 6:
4.5 bits an element. Scales per tensor are 1, what serving programs take where a checkpoint has none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kvjax.caches.base import LayerShapes
from kvjax.caches.stored import StoredSpec, TensorSpec
from kvjax.errors import KvjaxError
from kvjax.ops.store import RowFormat

GROUP = 16  # channels that share a scale of NVFP4
_E4M3 = jnp.float8_e4m3fn
_E2M1_MOST = 6.0


@dataclasses.dataclass(frozen=True)
class Fp8Rows(RowFormat):
    """Every element as e4m3; what lies beyond its largest, 448, becomes that."""

    @property
    def bits_asymptotic(self) -> float:
        return 8.0

    def encode(self, x: Float[Array, "... D"]) -> tuple[Array, ...]:
        return (_to_bytes(x),)

    def decode(self, kept: tuple[Array, ...], dtype: Any) -> Float[Array, "... D"]:
        return _of_bytes(kept[0], dtype)


@dataclasses.dataclass(frozen=True)
class Nvfp4Rows(RowFormat):
    """Every element as e2m1 times the scale of its 16 channels; two codes a byte."""

    @property
    def bits_asymptotic(self) -> float:
        return 4 + 8 / GROUP

    def encode(self, x: Float[Array, "... D"]) -> tuple[Array, ...]:
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, GROUP)
        scale = _to_bytes(jnp.abs(groups).max(-1) / _E2M1_MOST)
        step = _of_bytes(scale, jnp.float32)[..., None]
        codes = _to_e2m1(groups / jnp.where(step == 0, 1, step)).reshape(x.shape)
        return codes[..., ::2] | codes[..., 1::2] << 4, scale

    def decode(self, kept: tuple[Array, ...], dtype: Any) -> Float[Array, "... D"]:
        pairs, scale = kept
        x = _of_e2m1(jnp.stack([pairs & 15, pairs >> 4], -1), dtype)
        x = x.reshape(*scale.shape, GROUP) * _of_bytes(scale, dtype)[..., None]
        return x.reshape(*pairs.shape[:-1], -1)


def _to_e2m1(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Codes of 4 bits: the sign, then the rank among 0, .5, 1, 1.5, 2, 3, 4 and 6; halves to the even rank.

    XLA's CPU compiler cannot fuse conversions to its own type of these floats (jax 0.10).
    """
    size = jnp.minimum(jnp.abs(x), _E2M1_MOST)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    size = jnp.round(size / step) * step
    rank = jnp.where(size <= 2, 2 * size, jnp.where(size <= 4, size + 2, size / 2 + 4))
    return rank.astype(jnp.uint8) | jnp.signbit(x).astype(jnp.uint8) << 3


def _of_e2m1(codes: UInt8[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    rank = (codes & 7).astype(dtype)
    size = jnp.where(rank < 4, rank / 2, jnp.where(rank < 6, rank - 2, 2 * rank - 8))
    return jnp.where(codes >> 3 == 1, -size, size)


def _to_bytes(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """e4m3, rounded and saturated. A NaN stays one."""
    most = float(jnp.finfo(_E4M3).max)
    return jax.lax.bitcast_convert_type(jnp.clip(x, -most, most).astype(_E4M3), jnp.uint8)


def _of_bytes(x: UInt8[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, _E4M3).astype(dtype)


@dataclasses.dataclass(frozen=True)
class FloatKV(StoredSpec):
    """Keys and values as FP8 (8) or NVFP4 (4), set independently. Kernels serve neither: XLA reads them."""

    key_bits: Literal[4, 8]
    value_bits: Literal[4, 8]

    form: ClassVar[str] = "kfp{key_bits}vfp{value_bits}"
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "fp8": {"key_bits": 8, "value_bits": 8},
        "nvfp4": {"key_bits": 4, "value_bits": 4},
    }
    examples: ClassVar[tuple[str, ...]] = ("fp8", "kfp8vfp4(residual=16,sink=3)")

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        if 4 in (self.key_bits, self.value_bits) and shape.head_dim % GROUP:
            raise KvjaxError(f"{self}: head_dim {shape.head_dim}; expected a multiple of {GROUP} for fp4")
        formats = {8: Fp8Rows(), 4: Nvfp4Rows()}
        widths = self.key_bits, self.value_bits
        return [TensorSpec(formats[bits], shape.kv_heads, shape.head_dim) for bits in widths]

    @property
    def bits_nominal(self) -> float:
        return (self.key_bits + self.value_bits) / 2
