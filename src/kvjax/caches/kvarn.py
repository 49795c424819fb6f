"""KVarN: blocks whose tokens and channels are evened out before they are quantised (arXiv 2606.03458).

Keys after RoPE and values are turned by a Hadamard matrix. In every block of R tokens of a kv head, the standard
deviations of tokens and of channels are evened out in turn (kvjax/quant/gains.py). Keys are then quantised per
channel over the whole block, with a gain for each token; values per token, with a gain for each channel of the block.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import struct

from kvjax.caches.base import Chunk, LayerShapes
from kvjax.caches.kv import Form, KVCache
from kvjax.caches.stored import StoredSpec, TensorSpec, Width
from kvjax.errors import KvjaxError
from kvjax.ops.key_form import KeyForm


@dataclasses.dataclass(frozen=True)
class KVarN(StoredSpec):
    """Keys of `key_bits` and values of `value_bits` (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    residual: R, the tokens of a block; 128 where None.
    sink: 128, as in the authors' settings.
    """

    key_bits: Width
    value_bits: Width
    sink: int = dataclasses.field(default=128, kw_only=True)

    form: ClassVar[str] = "kvarn{key_bits}v{value_bits}"
    examples: ClassVar[tuple[str, ...]] = ("kvarn4v2(residual=8,sink=3)", "kvarn2v3(residual=16,sink=0)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual == 0:
            raise KvjaxError(f"{self}: residual=0; expected a positive multiple of 8, the tokens of a block")
        if self.residual == self.default_residual:
            object.__setattr__(self, "residual", None)  # one spec, one name

    @property
    def cache_type(self) -> type[KVarNCache]:
        return KVarNCache

    @property
    def default_residual(self) -> int:
        return 128

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        if shape.head_dim % 8:
            raise KvjaxError(f"{self}: head_dim {shape.head_dim}; expected a multiple of 8")
        keys = self.format(self.key_bits, "channel", self.residual_length, gain="balanced")
        values = self.format(self.value_bits, "token", shape.head_dim, gain="balanced")
        return [TensorSpec(form, shape.kv_heads, shape.head_dim) for form in (keys, values)]

    @property
    def bits_nominal(self) -> float:
        return (self.key_bits + self.value_bits) / 2


@struct.dataclass
class KVarNCache(KVCache):
    """Keys after RoPE and values, turned."""

    @property
    def keys_after_rope(self) -> bool:
        return True

    def stored_form(self, chunk: Chunk) -> Form:
        return Form(KeyForm(turned=True), None, chunk.rope, turned=True)
