"""The unquantised cache: the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from kvjax.caches.kv import KV
from kvjax.errors import KvjaxError
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
        if mode or fields:
            raise KvjaxError(f"dense takes no {' and no '.join([f'@{mode}'] * bool(mode) + list(fields))}")
        return cls()

    def __str__(self) -> str:
        return "dense"
