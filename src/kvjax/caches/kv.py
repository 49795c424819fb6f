"""Quantised keys and values, their bit widths set independently: per-token-asym (`@token`) and KIVI (`@kivi`).

`@token`: keys and values per token, one group per token and kv head, residual 0. `@kivi`: keys per channel in groups
of 32 tokens, values per token in groups of 32 channels, residual 32 (KVTuner, section 3.2 and appendix C; KIVI).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Chunk, LayerShapes
from kvjax.caches.stored import (
    BlockStore,
    PairFit,
    ScaleWidth,
    StoredCache,
    StoredSpec,
    Tensors,
    TensorSpec,
    View,
    Width,
    fits_of,
    largest_divisor,
)
from kvjax.errors import KvjaxError
from kvjax.ops import attention
from kvjax.ops.key_form import KeyForm, turn
from kvjax.ops.rotate import rotate_heads

KIVI_GROUP = 32


@dataclasses.dataclass(frozen=True)
class KV(StoredSpec):
    """Keys of `key_bits` and values of `value_bits` (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    `k{b}v{b}` is the papers' form. `kr{b}v{b}` is a better one: kivi, 4 sinks, values turned, fitted.
    `omni{b}v{b}` is OScaR: kivi, residual 128, keys and values turned, a gain for each key (arXiv 2605.19660).

    group: elements that share a scale: tokens for `@kivi` keys, channels for the rest. None is the default:
      the whole head for `@token`, 32 for `@kivi` (shrunk to the largest multiple of 8 that divides the head).
    residual: 0 for `@token`, the token group for `@kivi` where None.
    rope: whether keys are stored after RoPE ("post") or before it ("pre").
    fit: how scales are chosen: mse is the least squared error, keys that of keys alone, unbiased the same with values
      as large as they were on average; integer makes zero points whole numbers of scales, as KVTuner's code does.
    scale: bits of a scale, and of a zero point, 16 or 8.
    rotate: hadamard turns every head of keys and values by a Hadamard matrix before they are quantised, values does
      so with values alone.
    center: bias takes the biases of the projections out before they are quantised. A model without biases has none
      to take out, and those of keys stay where a norm follows them (qk-norm).
    gain: norm divides every key by its root mean square before channels are quantised (`@kivi` only).
    """

    key_bits: Width
    value_bits: Width
    mode: str = "kivi"
    group: int | None = None
    rope: Literal["pre", "post"] = "post"
    fit: PairFit | Literal["integer"] = "minmax"
    scale: ScaleWidth = 16
    rotate: Literal["none", "hadamard", "values"] = "none"
    center: Literal["none", "bias"] = "none"
    gain: Literal["none", "norm"] = "none"

    form: ClassVar[str] = "k{key_bits}v{value_bits}"
    modes: ClassVar[tuple[str, ...]] = ("kivi", "token")
    # What was found to be better than the papers' forms has a name of its own (docs/decisions.md), as has OScaR.
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "kr{key_bits}v{value_bits}": {"mode": "kivi", "sink": 4, "fit": "unbiased", "rotate": "values"},
        "omni{key_bits}v{value_bits}": {"mode": "kivi", "residual": 128, "rotate": "hadamard", "gain": "norm"},
    }
    examples: ClassVar[tuple[str, ...]] = (
        "k4v2@token",
        "k3v5@token(group=8,residual=8,sink=3,fit=mse)",
        "kr4v4",
        "k4v3@kivi(group=8,sink=3,scale=8)",
        "k3v2@token(group=8,fit=mse,scale=8)",
        "k2v16@kivi(group=8,residual=16,sink=5,rope=pre)",
        "k4v3@kivi(sink=3,rotate=hadamard,fit=integer)",
        "k3v2@kivi(group=8,sink=3,rotate=values,fit=unbiased)",
        "k3v4@token(rope=pre,rotate=hadamard,center=bias)",
        "omni2v3(group=8,residual=16,sink=3)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group == 0:
            raise KvjaxError(f"{self}: group=0; expected at least 1")
        if self.gain != "none" and self.mode != "kivi":
            raise KvjaxError(f"{self}: gain={self.gain}; expected @kivi, because a token has a scale in @{self.mode}")
        if self.residual == self.default_residual:
            object.__setattr__(self, "residual", None)  # one spec, one name
        self._formats(8 * (self.group or 1))  # the token group fits the residual

    @property
    def cache_type(self) -> type[StoredCache]:
        return KVCache

    @property
    def token_group(self) -> int:
        """Tokens that share a scale of `@kivi` keys."""
        return self.group or KIVI_GROUP

    @property
    def default_residual(self) -> int:
        return self.token_group if self.mode == "kivi" else 0

    def _formats(self, head_dim: int):
        if head_dim % 8:
            raise KvjaxError(f"{self}: head_dim {head_dim}; expected a multiple of 8")
        if self.group and head_dim % self.group:
            raise KvjaxError(f"{self}: group {self.group} does not divide the head_dim of {head_dim}")
        channels = self.group or (head_dim if self.mode == "token" else largest_divisor(KIVI_GROUP, head_dim))
        keys = ("token", channels) if self.mode == "token" else ("channel", self.token_group)
        of_keys, of_values = fits_of(self.fit)
        of = self.format(self.key_bits, *keys, of_keys, self.scale, self.gain)
        return of, self.format(self.value_bits, "token", channels, of_values, self.scale)

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        return [TensorSpec(form, shape.kv_heads, shape.head_dim) for form in self._formats(shape.head_dim)]

    @property
    def bits_nominal(self) -> float:
        return (self.key_bits + self.value_bits) / 2


@struct.dataclass
class Form:
    """How packed keys and values differ from those of the chunk; sinks and residual are kept as they are.

    Attributes:
      keys: the form of keys.
      v_bias: c, the bias of values; None where it stays in.
      rope: gives the table of any positions.
      turned: whether values are stored turned by H.
    """

    keys: KeyForm
    v_bias: Float[Array, "K d"] | None
    rope: Any
    turned: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, spec: KV, chunk: Chunk) -> Form:
        """That of a layer."""
        pre, *turned = spec.rope == "pre", spec.rotate == "hadamard", spec.rotate != "none"
        if spec.center == "none":
            return cls(KeyForm(None, pre, turned[0]), None, chunk.rope, turned[1])
        weights, heads = chunk.weights, chunk.k.shape[2:]
        k_bias, v_bias = (b if b is None else b.reshape(heads) for b in (weights.k_bias, weights.v_bias))
        k_bias = k_bias if weights.k_norm is None else None
        return cls(KeyForm(k_bias, pre, turned[0]), v_bias, chunk.rope, turned[1])

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors:
        """Keys and values as they are packed: values are H (v - c)."""
        k, v = tensors
        cos, sin = self.rope.table(positions[:, None], k.dtype)  # broadcast over heads
        k = self.keys.store(k.swapaxes(1, 2), (cos, sin)).swapaxes(1, 2)
        v = v if self.v_bias is None else v - self.v_bias
        return k, turn(v) if self.turned else v

    def logical_axes(self) -> Form:
        bias: Any = PartitionSpec("kv_heads")
        return Form(self.keys.logical_axes(), bias, PartitionSpec(), self.turned)

    def values(self, x: Float[Array, "... H d"]) -> Float[Array, "... H d"]:
        """Values of packed ones, or an attention's output of its output over packed ones: its weights sum to 1."""
        x = turn(x) if self.turned else x
        if self.v_bias is None:
            return x
        return x + jnp.repeat(self.v_bias, x.shape[-2] // self.v_bias.shape[0], 0)


@struct.dataclass
class KVCache(StoredCache):
    """Keys, before or after RoPE, and values."""

    @property
    def keys_after_rope(self) -> bool:
        return self.spec.rope == "post"

    def new_tensors(self, chunk: Chunk) -> Tensors:
        k = rotate_heads(chunk.k, chunk.rotation) if self.keys_after_rope else chunk.k
        return k, chunk.v

    def stored_form(self, chunk: Chunk) -> Form:
        """How packed keys and values differ from those of the chunk."""
        return Form.of(self.spec, chunk)

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        return self.store.append(self.new_tensors(chunk), chunk, self.stored_form(chunk)), carry

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        form, q, (keys, values) = self.stored_form(chunk), chunk.q, view.packed
        table = view.table(chunk) if form.keys.needs_positions else None
        if form.keys.turned and table is None:
            q = turn(q)  # (H q) (H k) = q k: kernels read keys as they are stored
        part = attention.attend_packed(q, view.span(chunk), keys, values, table, form.keys)
        return part._replace(output=form.values(part.output))

    def read_packed(
        self, view: View, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        form, (k, v) = self.stored_form(chunk), super().read_packed(view, chunk, carry)
        k = form.keys.load(k.swapaxes(1, 2), view.table(chunk)).swapaxes(1, 2)
        return k, form.values(v)
