"""The unquantised cache: the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvjax.caches.base import LayerShapes
from kvjax.caches.fields import derived
from kvjax.caches.stored import StoredSpec, TensorSpec
from kvjax.ops.store import EXACT


@dataclasses.dataclass(frozen=True)
class Dense(StoredSpec):
    """Keys (after RoPE) and values in the cache's dtype, every token as it comes."""

    residual: int | None = derived(None)
    sink: int = derived(0)

    form: ClassVar[str] = "dense"
    examples: ClassVar[tuple[str, ...]] = ("dense",)

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        return [TensorSpec(self.format(EXACT, "token", 1), shape.kv_heads, shape.head_dim)] * 2

    @property
    def bits_nominal(self) -> float:
        return EXACT
