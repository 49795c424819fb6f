"""What a layer of a state gives back: keys and values, dequantised, and how far they are from others.

B sequences, N tokens of the longest, K kv heads, d head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Chunk, LayerCache
from kvjax.caches.plan import Cache
from kvjax.calibrate.bases import load_bases
from kvjax.errors import KvjaxError
from kvjax.mesh import fetch
from kvjax.models.decoder import Layer, layer_of
from kvjax.models.model import Model
from kvjax.models.params import Params
from kvjax.models.rope import make_rope


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerError:
    """Relative errors, sqrt(sum (x - x^)^2 / sum x^2), over sequences, tokens and channels.

    Attributes:
      keys, values: over all heads.
      keys_per_head, values_per_head: of each kv head.
    """

    keys: float
    values: float
    keys_per_head: Float[np.ndarray, "K"]
    values_per_head: Float[np.ndarray, "K"]

    def __repr__(self) -> str:
        return f"<LayerError keys {self.keys:.3g}, values {self.values:.3g}>"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerView:
    """Keys and values as a layer's cache gives them back, token p of a sequence at [p].

    Attributes:
      keys, values: keys after RoPE, and values, float32 or wider; 0 where absent.
      positions: p where the cache holds the token at p, -1 where it does not.
    """

    keys: Float[np.ndarray, "B N K d"]
    values: Float[np.ndarray, "B N K d"]
    positions: Int[np.ndarray, "B N"]

    def error(self, other: LayerView) -> LayerError:
        """How far keys and values are from those of `other`, for example of a dense state of the same tokens.

        Only positions that both hold count.

        Raises:
          KvjaxError: the two have other sizes, or no position in common.
        """
        if self.keys.shape[:1] + self.keys.shape[2:] != other.keys.shape[:1] + other.keys.shape[2:]:
            raise KvjaxError(f"{self!r} is compared with {other!r}; expected as many sequences and heads of one size")
        count = min(self.positions.shape[1], other.positions.shape[1])
        both = (self.positions[:, :count] >= 0) & (other.positions[:, :count] >= 0)
        if not both.any():
            raise KvjaxError(f"{self!r} and {other!r} have no position in common; expected states of the same tokens")

        def select(x: np.ndarray) -> Float[np.ndarray, "n K d"]:
            return np.asarray(x[:, :count][both], np.float64)

        keys, keys_per_head = _relative(select(self.keys), select(other.keys))
        values, values_per_head = _relative(select(self.values), select(other.values))
        return LayerError(keys, values, keys_per_head, values_per_head)

    def __repr__(self) -> str:
        batch, _, heads, width = self.keys.shape
        held = " + ".join(map(str, (self.positions >= 0).sum(1)))
        return f"<LayerView of {batch} sequences: {held} tokens, {heads} kv heads of {width}, {self.keys.dtype}>"


def read_layer(model: Model, cache: Cache, index: int) -> LayerView:
    """Layer `index` of a cache of the model. Where layers depend on one another, those below it are read as well."""
    bases, carry = load_bases(model, cache.plan), cache.plan.init_carry(cache.shape)
    for i in range(0 if jax.tree.leaves(carry) else index, index + 1):
        layer = layer_of(model.config, i)
        with model.layout.entered():
            keys, values, positions, carry = _materialize(
                layer, cache.shape.max_len, model.params[f"layer_{i}"], bases[i], cache.layers[i], cache.length, carry
            )
    held, count = fetch(positions), int(fetch(cache.length).max())
    keys, values = (
        _by_position(x, held, np.zeros((len(held), count, *x.shape[2:]), x.dtype)) for x in (keys, values)
    )
    return LayerView(keys, values, _by_position(positions, held, np.full((len(held), count), -1)))


@struct.dataclass
class _Reader:
    """Gives what the cache gives back, in the place of the cache."""

    cache: LayerCache

    def attend(self, chunk: Chunk, carry: Any):
        keys, values, positions, _, carry = self.cache.materialize(chunk, carry)
        wide = jnp.promote_types(keys.dtype, jnp.float32)
        return jnp.zeros_like(chunk.q), (keys.astype(wide), values.astype(wide), positions), carry


@functools.partial(jax.jit, static_argnames=("layer", "max_len"))
def _materialize(
    layer: Layer, max_len: int, params: Params, bases: Any, cache: LayerCache, length: Int[Array, "B"], carry: Any
):
    """The layer reads one token of padding. Layers with the same spec share a program."""
    config, dtype = layer.config, params["k"].dtype
    h, positions = jnp.zeros((len(length), 1, config.model_dim), dtype), length[:, None]
    rope = make_rope(layer.rope, config.head_dim, max_len)
    apply: Any = layer.apply
    _, read, carry = apply(
        *({"params": params}, h, positions, jnp.zeros_like(length), rope, rope.table(positions, dtype)),
        *(bases, _Reader(cache), carry, "exact"),
    )
    return *read, carry


def _by_position(x: Array, positions: Int[np.ndarray, "B S"], into: np.ndarray) -> np.ndarray:
    rows, slots = np.nonzero(positions >= 0)
    into[rows, positions[rows, slots]] = fetch(x)[rows, slots]
    return into


def _relative(x: Float[np.ndarray, "n K d"], exact: Float[np.ndarray, "n K d"]) -> tuple[float, np.ndarray]:
    """Overall and per head."""
    wrong, all_of_it = (np.square(each).sum((0, 2)) for each in (x - exact, exact))
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing to be relative to: inf, or nan
        return float(np.sqrt(wrong.sum() / all_of_it.sum())), np.sqrt(wrong / all_of_it)
