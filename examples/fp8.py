"""Keys and values rounded to 8-bit floating point (e4m3): a simulated method."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

import kvjax
from kvjax.caches.simulated import SimulatedSpec


@kvjax.register
@dataclasses.dataclass(frozen=True)
class Float8(SimulatedSpec):
    form: ClassVar[str] = "fp8"
    examples: ClassVar[tuple[str, ...]] = ("fp8", "fp8(residual=16,sink=4)")
    bits_nominal: ClassVar[float] = 8.0

    def bits_asymptotic(self, shape) -> float:
        return 8.0

    def simulate(self, k, v, real):
        return tuple(x.astype(jnp.float8_e4m3fn).astype(x.dtype) for x in (k, v))
