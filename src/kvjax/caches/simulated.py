"""Simulated methods: a function of keys and values and a claim of bits; attention, scores and searches follow.

What is read is what the method would read back, but it is kept unquantised: `simulated` marks the rows of results,
and their bits and bytes are the claimed ones.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.base import CacheShape, Chunk, LayerShapes
from kvjax.caches.stored import BlockStore, StoredCache, StoredSpec, Tensors, TensorSpec
from kvjax.ops.store import EXACT


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedSpec(StoredSpec):
    """Subclasses give `simulate` and the claimed bits; `default_residual` where blocks are stored together."""

    simulated: ClassVar[bool] = True

    @abc.abstractmethod
    def simulate(
        self, k: Float[Array, "N T K d"], v: Float[Array, "N T K d"], real: Bool[Array, "N T"]
    ) -> tuple[Float[Array, "N T K d"], Float[Array, "N T K d"]]:
        """Keys (after RoPE) and values as they are read back.

        Args:
          k: keys of blocks of T = R tokens that are stored together. Where R = 0, tokens are stored one by one, and
            what is read back of a token must follow from that token alone.
          v: the values of the same tokens.
          real: which tokens a block holds; nobody reads the others (sinks, tokens to come).
        """

    @property
    def cache_type(self) -> type[StoredCache]:
        return SimulatedCache

    @property
    def program_form(self) -> SimulatedSpec:
        return self  # its widths are not the store's

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        return [TensorSpec(self.format(EXACT, "token", 1), shape.kv_heads, shape.head_dim)] * 2

    @abc.abstractmethod
    def bits_asymptotic(self, shape: LayerShapes) -> float:
        """Claimed bits per element of K and V at long context, side information included."""

    def counted_bytes(self, shape: CacheShape) -> float:
        exact = self.residual_length + self.sink
        held = min(shape.max_len, jax.eval_shape(lambda: self.init(shape)).store.tokens)
        bits = held * self.bits_asymptotic(shape) + exact * 8 * jnp.dtype(shape.dtype).itemsize
        return shape.batch * shape.elements_per_token * bits / 8


@struct.dataclass
class SimulatedCache(StoredCache):
    """Keys after RoPE and values, as they would be read back."""

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        read_back = ReadBack(chunk.positions[:, 0] + chunk.lengths, self.spec)
        return self.store.append(self.new_tensors(chunk), chunk, read_back), carry


@struct.dataclass
class ReadBack:
    """Keys and values as a quantiser gives them back, of sequences that end at `end`."""

    end: Int[Array, "B"]
    spec: Any = struct.field(pytree_node=False)  # SimulatedSpec

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors:
        real = (positions >= self.spec.sink) & (positions < self.end[:, None])
        count = self.spec.residual_length or positions.shape[1]
        k, v, mask = (a.reshape(-1, count, *a.shape[2:]) for a in (*tensors, real))
        return [a.reshape(tensors[0].shape) for a in self.spec.simulate(k, v, mask)]

    def logical_axes(self) -> ReadBack:
        return ReadBack(PartitionSpec("batch"), self.spec)  # type: ignore[arg-type]
