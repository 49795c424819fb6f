"""The unquantised cache: the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from kvjax.caches.base import check_fields
from kvjax.caches.kv import KV
from kvjax.ops.store import EXACT


@dataclasses.dataclass(frozen=True)
class Dense(KV):
    """Keys (after RoPE) and values in the cache's dtype, every token as it comes."""

    key_bits: int = EXACT
    value_bits: int = EXACT
    mode: str = "token"

    pattern: ClassVar[str] = "dense"

    @classmethod
    def parse(cls, name: str, mode: str | None, fields: dict[str, Any]) -> Dense:
        check_fields(name if mode is None else f"{name}@{mode}", fields if mode is None else {"mode": mode}, {})
        return cls()

    def __str__(self) -> str:
        return "dense"
