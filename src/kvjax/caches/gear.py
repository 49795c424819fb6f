"""GEAR: a quantised base, its outliers exact, and a low-rank part of what the base leaves (arXiv 2403.05527).

A chunk of R tokens is stored together. Of keys the vectors are the channels of a chunk, of values the tokens over all
heads. In each vector the s/2 % largest and as many smallest entries are kept apart and count as the vector's mean
where the base takes its scales. The base is KIVI's: keys per channel, values per token. Of the error of base and
outliers each head keeps r singular directions, found by power iterations. Simulated: what it keeps is not packed.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kvjax.caches.base import CacheSpec, LayerShapes
from kvjax.caches.simulated import SimulatedSpec
from kvjax.caches.stored import TensorSpec, largest_divisor
from kvjax.errors import KvjaxError
from kvjax.ops.store import EXACT
from kvjax.quant import affine

LOOPS = 3  # power iterations, as the authors run
OUTLIER_BITS = 16 + 16  # an outlier and its place
FACTOR_BITS = 16


@dataclasses.dataclass(frozen=True)
class Gear(SimulatedSpec):
    """Keys and values of `bits` bits with outliers and a low-rank part.

    group: tokens of a channel of keys, channels of a token of values (less where head_dim is less).
    residual: the chunk, the group where None.
    sparse: outliers in percent of a vector's entries, at least one at either end; 0 keeps none.
    rank: directions of the error that each head keeps of a chunk.
    """

    bits: Literal[1, 2, 3, 4, 5, 6, 8]
    group: int = 64
    sparse: float = 2.0
    rank: int = 2

    form: ClassVar[str] = "gear{bits}"
    examples: ClassVar[tuple[str, ...]] = ("gear2(group=16)", "gear3(group=8,residual=16,sink=3,sparse=10,rank=4)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse >= 100:
            raise KvjaxError(f"{self}: sparse={self.sparse}; expected less than 100 percent")
        if self.group < 8:
            raise KvjaxError(f"{self}: group={self.group}; expected at least 8")
        self.format(self.bits, "channel", self.group)  # the group divides the chunk

    @property
    def default_residual(self) -> int:
        return self.group

    @property
    def bits_nominal(self) -> float:
        return self.bits

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        if shape.head_dim % 8:
            raise KvjaxError(f"{self}: head_dim {shape.head_dim}; expected a multiple of 8")
        if self.rank > (most := min(shape.head_dim, self.residual_length)):
            raise KvjaxError(f"{self}: rank={self.rank}; expected at most {most}")
        # The outliers of a value are chosen over all heads, so a mesh must not divide these.
        return [TensorSpec(self.format(EXACT, "token", 1), shape.kv_heads, shape.head_dim, None)] * 2

    logical_axes = CacheSpec.logical_axes

    def bits_asymptotic(self, shape: LayerShapes) -> float:
        r, d = self.residual_length, shape.head_dim
        width = shape.kv_heads * d
        sides = [2 * self._outliers(n) * OUTLIER_BITS / n for n in (r, width)]
        scales = [2 * 16 / group for group in (self.group, largest_divisor(self.group, d))]
        return self.bits + sum(sides + scales) / 2 + FACTOR_BITS * self.rank * (r + d) / (r * d)

    def _outliers(self, entries: int) -> int:
        """How many of a vector's entries are kept at either end."""
        return max(1, round(self.sparse / 200 * entries)) if self.sparse else 0

    def simulate(
        self, k: Float[Array, "N T K d"], v: Float[Array, "N T K d"], real: Bool[Array, "N T"]
    ) -> tuple[Float[Array, "N T K d"], Float[Array, "N T K d"]]:
        (count, tokens, heads, width), mask = k.shape, real[..., None]
        flat = v.reshape(count, tokens, -1)
        of_k = extremes(k, mask[..., None], 1, self._outliers(tokens))
        of_v = extremes(flat, mask, 2, self._outliers(heads * width)).reshape(v.shape)
        mean = jnp.mean(flat, 2)[..., None, None]
        means = jnp.mean(k, 1, keepdims=True, where=mask[..., None]), mean
        axes = (-3, self.group), (-1, largest_divisor(self.group, width))
        outliers = zip((k, v), (of_k, of_v), means, axes, strict=True)
        return tuple(self._read_back(*each, mask[..., None]) for each in outliers)  # type: ignore[return-value]

    def _read_back(
        self,
        x: Float[Array, "N T K d"],
        outlier: Bool[Array, "N T K d"],
        mean: Float[Array, "..."],
        groups: tuple[int, int],
        real: Bool[Array, "N T 1 1"],
    ) -> Float[Array, "N T K d"]:
        """Base and outliers, and the low-rank part of their error."""
        q = affine.quantize(jnp.where(outlier, mean, x), self.bits, *groups, real)
        base = affine.dequantize(q, *groups, x.dtype)
        base = jnp.where(outlier, half(x), base)
        error = jnp.where(real, x - base, 0).swapaxes(1, 2)
        return base + low_rank(error, self.rank).swapaxes(1, 2)


def extremes(x: Float[Array, "..."], real: Bool[Array, "..."], axis: int, count: int) -> Bool[Array, "..."]:
    """Which of the real entries along an axis are the `count` largest or the `count` smallest."""
    if not count:
        return jnp.zeros(x.shape, bool)

    def largest(x: Array) -> Array:
        rows = jnp.moveaxis(jnp.where(real, x, -jnp.inf), axis, -1)
        at, none = jax.lax.top_k(rows, count)[1], jnp.zeros(rows.shape, bool)
        return jnp.moveaxis(jnp.put_along_axis(none, at, True, -1, inplace=False), -1, axis) & real

    return largest(x) | largest(-x)


def low_rank(error: Float[Array, "... T d"], rank: int) -> Float[Array, "... T d"]:
    """The part of matrices along their leading singular directions, of factors in float16.

    Power iterations from a random start; the last one orthonormalises by QR, as the authors' code does.

    Args:
      error: matrices.
      rank: directions r.

    Returns:
      A B^T with A [T, r] and B [d, r].
    """
    if not rank:
        return jnp.zeros_like(error)
    b = jnp.asarray(np.random.default_rng(0).random((error.shape[-1], rank)), error.dtype)
    for i in range(LOOPS):
        last = i == LOOPS - 1
        a = error @ (jnp.linalg.qr(b)[0] if last else b)
        a = jnp.linalg.qr(a)[0] if last else a
        b = error.swapaxes(-1, -2) @ a
    return half(a) @ half(b).swapaxes(-1, -2)


def half(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounded to float16."""
    return x.astype(jnp.float16).astype(x.dtype)
