"""A pair of widths for each kv head: `k8v4/k4v2/k4v2@kivi`, from the first head to the last.

KVTuner's public code reads such plans (`per_head_config`). Heads that have the same pair are kept together, each
other pair in a cache of its own, so that bytes are what the pairs say; attention reads one after the other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, LayerCache, LayerShapes
from kvjax.caches.kv import KV
from kvjax.checks import show
from kvjax.errors import KvjaxError
from kvjax.mesh import is_axes

BETWEEN = "/"  # the pairs of a name

Groups = tuple[tuple[int, ...], ...]
"""The kv heads that are kept together."""


@dataclasses.dataclass(frozen=True)
class PerHead(CacheSpec):
    """Quantised keys and values, a pair of widths for each kv head: `k8v4/k4v2/k4v2@kivi`.

    pairs: of every kv head; they differ in their widths alone.
    groups: the heads that are kept together: by default those with the same pair.
    """

    pairs: tuple[KV, ...]
    groups: Groups = dataclasses.field(default=(), kw_only=True)

    form: ClassVar[str] = "k{b}v{b}/k{b}v{b}"
    modes: ClassVar[tuple[str, ...]] = KV.modes
    examples: ClassVar[tuple[str, ...]] = (
        "k4v2/k3v8@kivi(group=8,sink=3)",
        "k16v5/k8v2@token(rope=pre,rotate=hadamard,center=bias)",
    )

    def __post_init__(self) -> None:
        if type(self.pairs) is not tuple or not all(isinstance(pair, KV) for pair in self.pairs):
            raise KvjaxError(f"pairs={show(self.pairs)}; expected a tuple of KV, one for each kv head")
        if len({pair.with_widths(lambda _: 8) for pair in self.pairs}) != 1:
            raise KvjaxError(f"{BETWEEN.join(map(str, self.pairs))}: expected pairs that differ in widths alone")
        if not self.groups:
            each: dict[KV, list[int]] = {pair: [] for pair in self.pairs}
            for head, pair in enumerate(self.pairs):
                each[pair].append(head)
            object.__setattr__(self, "groups", tuple(map(tuple, each.values())))
        heads = [head for group in self.groups if type(group) is tuple for head in group]
        if sorted(heads) != list(range(len(self.pairs))):
            expected = f"expected each of the {len(self.pairs)} kv heads once"
            raise KvjaxError(f"groups={show(self.groups)}; {expected}")

    @classmethod
    def parse(cls, name: str, mode: str | None, settings: Mapping[str, str]) -> PerHead | None:
        if BETWEEN not in name:
            return None
        pairs = [KV.parse(pair, mode, settings) for pair in name.split(BETWEEN)]
        known = tuple(pair for pair in pairs if isinstance(pair, KV))
        if known and len(known) < len(pairs):
            raise KvjaxError(f"{name}: expected a pair for each kv head, as in k8v4/k4v2@kivi")
        return cls(known) if known else None

    def __str__(self) -> str:
        return _join(map(str, self.pairs))

    @property
    def short_text(self) -> str:
        return _join(pair.short_text for pair in self.pairs)

    # ---- what KV promises

    @property
    def largest_chunk(self) -> int | None:
        return self.pairs[0].largest_chunk

    @property
    def whole_windows(self) -> bool:
        return True

    @property
    def residual_length(self) -> int:
        return self.pairs[0].residual_length

    def coded_tokens(self, length: int) -> int:
        return max(pair.coded_tokens(length) for pair in self.pairs)

    # ---- what it stores

    def resolve(self, model: LayerShapes) -> CacheSpec:
        pairs = cast(list[KV], [pair.resolve(model) for pair in self.pairs])
        if len(pairs) != model.kv_heads:
            raise KvjaxError(f"{self}: {len(pairs)} pairs; expected one for each of the {model.kv_heads} kv heads")
        return PerHead(tuple(pairs)) if len({*pairs}) > 1 else pairs[0]

    def init(self, shape: CacheShape) -> PerHeadCache:
        parts = (self.pairs[heads[0]].init(_part(shape, heads)) for heads in self.groups)
        return PerHeadCache(tuple(parts), self.groups)

    def logical_axes(self, shape: CacheShape) -> Any:
        """Tokens are divided as those of `KV`; a group has too few heads to be divided, and is whole everywhere."""
        parts = (self.pairs[heads[0]].logical_axes(_part(shape, heads)) for heads in self.groups)
        whole = lambda axes: PartitionSpec(*(None if axis == "kv_heads" else axis for axis in axes))  # noqa: E731
        return jax.tree.map(whole, PerHeadCache(tuple(parts), self.groups), is_leaf=is_axes)

    @property
    def bits_nominal(self) -> float:
        return float(np.mean([pair.bits_nominal for pair in self.pairs]))

    def bits_asymptotic(self, shape: LayerShapes) -> float:
        return float(np.mean([pair.bits_asymptotic(shape) for pair in self.pairs]))

    @property
    def program_form(self) -> CacheSpec:
        forms = cast(list[KV], [pair.program_form for pair in self.pairs])
        return PerHead(tuple(forms), groups=self.groups)


def _join(names: Iterable[str]) -> str:
    """The names of pairs as one: mode and fields, which all share, stand at its end."""
    parts = [re.split(r"(?=[@(])", name, maxsplit=1) for name in names]
    return BETWEEN.join(pair for pair, *_ in parts) + "".join(parts[0][1:])


def _part(shape: CacheShape, heads: tuple[int, ...]) -> CacheShape:
    """The sizes of a cache of some of the kv heads."""
    return dataclasses.replace(shape, heads=shape.heads // shape.kv_heads * len(heads), kv_heads=len(heads))


def _query_heads(chunk: Chunk, heads: tuple[int, ...]) -> Int[np.ndarray, "h"]:
    """The query heads that read some of the kv heads."""
    shared = chunk.q.shape[2] // chunk.k.shape[2]
    return (np.array(heads)[:, None] * shared + np.arange(shared)).ravel()


def _chunk_of(chunk: Chunk, heads: tuple[int, ...]) -> Chunk:
    """What a cache of some of the kv heads is told of a chunk."""
    of_kv, of_q, weights = np.array(heads), _query_heads(chunk, heads), chunk.weights

    def bias(b: Float[Array, "Kd"] | None) -> Float[Array, "kd"] | None:
        return None if b is None else b.reshape(chunk.k.shape[2:])[of_kv].ravel()

    return dataclasses.replace(
        chunk,
        q=chunk.q[:, :, of_q],
        k=chunk.k[:, :, of_kv],
        v=chunk.v[:, :, of_kv],
        weights=dataclasses.replace(weights, k_bias=bias(weights.k_bias), v_bias=bias(weights.v_bias)),
        learned_sinks=None if chunk.learned_sinks is None else chunk.learned_sinks[of_q],
    )


@struct.dataclass
class PerHeadCache(LayerCache):
    """A cache for each group of kv heads."""

    parts: tuple[LayerCache, ...]
    groups: Groups = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], PerHeadCache, Any]:
        pairs = zip(self.parts, self.groups, strict=True)
        found = [part.attend(_chunk_of(chunk, heads), carry) for part, heads in pairs]
        order = np.argsort(np.concatenate([_query_heads(chunk, heads) for heads in self.groups]))
        output = jnp.concatenate([output for output, _, _ in found], 2)[:, :, order]
        return output, dataclasses.replace(self, parts=tuple(part for _, part, _ in found)), carry

    def materialize(self, chunk: Chunk, carry: Any) -> tuple[Array, Array, Array, PerHeadCache, Any]:
        pairs = zip(self.parts, self.groups, strict=True)
        found = [part.materialize(_chunk_of(chunk, heads), carry) for part, heads in pairs]
        keys, values, positions, parts, _ = zip(*found, strict=True)
        order = np.argsort(np.concatenate(self.groups))
        k, v = (jnp.concatenate(each, 2)[:, :, order] for each in (keys, values))
        return k, v, positions[0], dataclasses.replace(self, parts=parts), carry
