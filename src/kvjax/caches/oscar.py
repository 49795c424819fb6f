"""OSCAR: keys and values turned by rotations that are learned from a text, and clipped (arXiv 2605.17757).

A layer has a rotation for keys and one for values, each for all its kv heads: R H P, with R the eigenvectors of a
second moment, H a Hadamard matrix and P an order of the channels. That of keys is of what queries are, R of Q^T Q.
That of values is as the authors' code has it, of values weighted by k Q^T Q k^T of their keys; the paper writes
another. A turned row is clipped at one of its own absolute values and quantised from its minimum and maximum. Queries
are turned at run time, and the output over packed values is turned back once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Chunk, KVWeights, LayerShapes
from kvjax.caches.statistics import Statistics
from kvjax.caches.stored import (
    BlockStore,
    ScaleWidth,
    StoredCache,
    StoredSpec,
    Tensors,
    TensorSpec,
    View,
    Width,
    largest_divisor,
)
from kvjax.errors import KvjaxError
from kvjax.ops import attention
from kvjax.quant.basis import block_hadamard

GROUP = 128  # channels


@dataclasses.dataclass(frozen=True)
class Oscar(StoredSpec):
    """Keys and values of `bits` (1, 2, 3, 4, 5, 6, 8; 16 is unquantised) per token, in groups of up to 128 channels.

    clip_keys, clip_values: c; a head of a token is clipped at its absolute value number floor(c d) of d, in rising
      order from 0. 1 clips nothing.
    scale: bits of a scale, and of a zero point, 16 or 8; the authors' scripts take 32.
    residual: 256 where None. The authors keep the last 256 tokens exact at all times, here 0 to 255 are.
    """

    bits: Width
    clip_keys: float = 0.96
    clip_values: float = 0.92
    scale: ScaleWidth = 16
    sink: int = dataclasses.field(default=64, kw_only=True)

    form: ClassVar[str] = "oscar{bits}"
    examples: ClassVar[tuple[str, ...]] = (
        "oscar2(residual=0,sink=0)",
        "oscar3(residual=8,sink=3,clip_keys=0.8)",
        "oscar4(residual=16,sink=5,scale=8,clip_values=1.0)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_keys", "clip_values"):
            if not 0 < getattr(self, name) <= 1:
                raise KvjaxError(f"{self}: {name}={getattr(self, name)}; expected a part above 0, at most 1")
        if self.residual == self.default_residual:
            object.__setattr__(self, "residual", None)  # one spec, one name

    @property
    def cache_type(self) -> type[OscarCache]:
        return OscarCache

    @property
    def default_residual(self) -> int:
        return 256

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        if shape.head_dim % 8:
            raise KvjaxError(f"{self}: head_dim {shape.head_dim}; expected a multiple of 8")
        form = self.format(self.bits, "token", largest_divisor(GROUP, shape.head_dim), scale_bits=self.scale)
        return [TensorSpec(form, shape.kv_heads, shape.head_dim)] * 2

    @property
    def bits_nominal(self) -> float:
        return self.bits

    @property
    def bases_key(self) -> str:
        return "oscar"

    @property
    def calibrated(self) -> bool:
        return True

    def bases(self, weights: KVWeights, norm: Array, statistics: Statistics | None = None) -> Any:
        """The rotations [d, d] of keys and of values."""
        assert statistics is not None
        return [oscar_rotation(moment.mean(0)) for moment in (statistics.query, statistics.seen_value)]


def oscar_rotation(moment: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """R H P, with R the eigenvectors of a moment, in rising order of their eigenvalues.

    P puts the column of R H with the place of the i-th largest eigenvalue at the place that i's bits give, read in
    reverse. It matters only where several groups share a head. Where d is no power of two, H turns blocks, and there
    is no P.
    """
    size = len(moment)
    _, vectors = np.linalg.eigh((moment + moment.T) / 2)
    turned = vectors @ block_hadamard(size)
    if size & (size - 1):
        return turned
    place = [int(f"{i:0{size.bit_length() - 1}b}"[::-1], 2) for i in range(size)]
    order = np.empty(size, int)
    order[place] = np.arange(size)[::-1]
    return turned[:, order]


@struct.dataclass
class Turned:
    """Packed keys and values: turned by a matrix each and clipped."""

    of_keys: Float[Array, "d d"]
    of_values: Float[Array, "d d"]
    clips: tuple[float, float] = struct.field(pytree_node=False)

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors:
        matrices = self.of_keys, self.of_values
        return [
            clipped(times(x, matrix), part) for x, matrix, part in zip(tensors, matrices, self.clips, strict=True)
        ]

    def logical_axes(self) -> Turned:
        return Turned(PartitionSpec(), PartitionSpec(), self.clips)  # type: ignore[arg-type]


def times(x: Float[Array, "... d"], matrix: Float[Array, "d e"]) -> Float[Array, "... e"]:
    """The product, in float32 or wider."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(dtype), matrix.astype(dtype), precision="highest")


def clipped(x: Float[Array, "... d"], part: float) -> Float[Array, "... d"]:
    """Each row clipped at its absolute value number floor(part d), in rising order from 0; not where that is d."""
    at = int(part * x.shape[-1])
    if at == x.shape[-1]:
        return x
    most = jnp.sort(jnp.abs(x), -1)[..., at, None]
    return jnp.clip(x, -most, most)


@struct.dataclass
class OscarCache(StoredCache):
    """Keys after RoPE and values, turned and clipped where they are packed."""

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        of_keys, of_values = chunk.bases
        turned = Turned(of_keys, of_values, (self.spec.clip_keys, self.spec.clip_values))
        return self.store.append(self.new_tensors(chunk), chunk, turned), carry

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        (of_keys, of_values), (keys, values) = chunk.bases, view.packed
        part = attention.attend_packed(times(chunk.q, of_keys), view.span(chunk), keys, values)
        return part._replace(output=times(part.output, of_values.T))

    def read_packed(
        self, view: View, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        keys, values = super().read_packed(view, chunk, carry)
        return times(keys, chunk.bases[0].T), times(values, chunk.bases[1].T)
