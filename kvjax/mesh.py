"""Where arrays live: logical axes of caches to the axes of a mesh of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan


def shardings(plan: CachePlan, shape: CacheShape, mesh: jax.sharding.Mesh, rules: Mapping[str, str | None]) -> Any:
    """NamedShardings of `plan.init(shape).layers`: `rules` maps logical axes (batch, kv_heads) to mesh axes."""

    def sharding(axes: PartitionSpec) -> NamedSharding:
        physical = (rules.get(axis) if axis else None for axis in axes)
        return NamedSharding(mesh, PartitionSpec(*physical))

    is_leaf = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(sharding, plan.logical_axes(shape), is_leaf=is_leaf)
