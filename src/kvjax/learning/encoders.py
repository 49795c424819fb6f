"""What a layer reads back of its input through an encoder that may change, with gradients.

An encoder is what a spec calls the layer's bases: matrices down and up for what it quantises, and a gain of each
channel for deltas. It changes by a matrix A, down (1 + A) and (1 + A)^-1 up, and by parts of the gain, all 0 at the
start. So what is not rounded always comes back as it was. With a way back of its own an encoder learns to read all
values too small: that costs least token by token, and twice as much in the model, where the errors of many tokens
then agree (docs/decisions.md). N tokens, D model_dim, C = kv heads x head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from kvjax.caches.base import CacheSpec, KVWeights
from kvjax.caches.x import X
from kvjax.caches.xcl import XCL
from kvjax.errors import KvjaxError
from kvjax.learning.rounding import rounded
from kvjax.ops.store import Format

Bases = Any  # nested lists of arrays: [down, up] of keys and [down, up] of values, or [down, up, gain]
Changes = Any  # likewise


class Encoder(Protocol):
    """How a layer's input is stored and read back."""

    def read(
        self, bases: Bases, unit: Float[Array, "N D"], below: Float[Array, "N D"], counted: Bool[Array, "N"]
    ) -> tuple[Float[Array, "N 2C"], Float[Array, "N D"]]:
        """Reads rows that were stored.

        Args:
          bases: the encoder.
          unit: the layer's inputs, normalised, before the norm's weight.
          below: what the layer below read back of its own.
          counted: tokens that are quantised; others stay exact.

        Returns:
          Keys before bias, qk-norm and RoPE beside values before bias; and what the layer above finds `below`.
        """

    def exact(self, unit: Float[Array, "N D"]) -> Float[Array, "N 2C"]:
        """Keys and values of the rows themselves."""


@struct.dataclass
class _Exact:
    """What encoders share: the way to keys and values."""

    weights: Float[Array, "D 2C"]  # [W_k W_v], the norm's weight in them

    def exact(self, unit):
        return unit @ self.weights


@struct.dataclass
class InputEncoder(_Exact):
    """Of `x{b}@latent`: latents of keys and of values."""

    norm: Float[Array, "D"]
    formats: tuple[Format, ...] = struct.field(pytree_node=False)

    def read(self, bases, unit, below, counted):
        x, kept = unit * self.norm, counted[:, None]
        parts = [
            rounded(x @ down[0], form, counted) @ up[0] for (down, up), form in zip(bases, self.formats, strict=True)
        ]
        return jnp.where(kept, jnp.concatenate(parts, 1), self.exact(unit)), below


@struct.dataclass
class DeltaEncoder(_Exact):
    """Of `xcl{b}@latent(fold=1)`: latents of X, or of its difference from the layer below."""

    format: Format = struct.field(pytree_node=False)
    delta: bool = struct.field(pytree_node=False)

    def read(self, bases, unit, below, counted):
        down, up, *gain = bases
        known = jnp.zeros_like(unit)
        if self.delta:
            known = below * gain[0] if gain else below
        x = known + rounded((unit - known) @ down, self.format, counted) @ up
        return jnp.where(counted[:, None], x @ self.weights, self.exact(unit)), x


def encoder_of(spec: CacheSpec, weights: KVWeights, norm: Array, shape: Any) -> Encoder:
    """The encoder of a layer.

    Args:
      spec: its cache.
      weights: its K and V weights.
      norm: the weight of the norm before them.
      shape: sizes of the layer.

    Raises:
      KvjaxError: the spec is not one that is trained.
    """
    if not spec.trained:
        raise KvjaxError(
            f"{spec} is not trained; expected x{{b}}@latent or xcl{{b}}@latent(fold=1) with basis=learned"
        )
    both = jnp.concatenate([weights.k, weights.v]).T.astype(jnp.float32)
    wide = norm.astype(jnp.float32)
    formats = tuple(tensor.format for tensor in spec.tensors(shape))  # type: ignore[attr-defined]
    if isinstance(spec, X):
        return InputEncoder(wide[:, None] * both, wide, formats[:2])
    assert isinstance(spec, XCL)
    return DeltaEncoder(wide[:, None] * both, formats[0], spec.delta)


def no_changes(bases: Bases) -> Changes:
    """Changes that change nothing."""
    if isinstance(bases[0], list):
        return [no_changes(pair) for pair in bases]
    size = bases[0].shape[-1]
    return [jnp.zeros((size, size)), *(jnp.zeros(gain.shape) for gain in bases[2:])]


def changed(bases: Bases, by: Changes) -> Bases:
    """An encoder with changes."""
    if isinstance(bases[0], list):
        return [changed(*pair) for pair in zip(bases, by, strict=True)]
    down, up, *gain = bases
    turn = jnp.eye(len(by[0])) + by[0]
    back = jnp.linalg.solve(turn, up)
    return [down @ turn, back, *(g * (1 + part) for g, part in zip(gain, by[1:], strict=True))]


def as_arrays(bases: Bases, dtype: Any = jnp.float32) -> Bases:
    """The same in one dtype, on the device."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), bases)


def counted_tokens(spec: CacheSpec, tokens: int) -> Bool[Array, "N"]:
    """Which tokens of a window are quantised: all but the sinks."""
    return jnp.arange(tokens) >= getattr(spec, "sink", 0)


def cost(error: Float[Array, "N 2C"], fisher: Float[Array, "2C 2C"], counted: Bool[Array, "N"]) -> Float[Array, ""]:
    """The mean of ½ e H e^T over tokens that count: the KL divergence that errors of single tokens cost, in nats."""
    each = 0.5 * jnp.einsum("nc,cd,nd->n", error, fisher, error)
    return jnp.where(counted, each, 0).sum() / counted.sum()
