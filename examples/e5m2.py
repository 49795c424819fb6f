"""Keys and values rounded to 8-bit floating point (e5m2): a simulated method."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

import kvjax
from kvjax.caches.simulated import SimulatedSpec


@kvjax.register
@dataclasses.dataclass(frozen=True)
class E5M2(SimulatedSpec):
    form: ClassVar[str] = "e5m2"
    examples: ClassVar[tuple[str, ...]] = ("e5m2", "e5m2(residual=16,sink=4)")
    bits_nominal: ClassVar[float] = 8.0

    def bits_asymptotic(self, shape) -> float:
        return 8.0

    def simulate(self, k, v, real):
        return tuple(x.astype(jnp.float8_e5m2).astype(x.dtype) for x in (k, v))
