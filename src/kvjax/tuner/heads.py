"""A choice for each kv head: what single heads cost, and the pairs of a layer that follow from it.

The error of a layer is taken to be the sum of its heads' errors, each measured with the other heads exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvjax.caches.base import CacheSpec, LayerShapes
from kvjax.caches.heads import PerHead
from kvjax.caches.kv import KV
from kvjax.errors import KvjaxError
from kvjax.ops.store import EXACT
from kvjax.tuner.space import pareto


def pairs_of(candidates: Sequence[CacheSpec]) -> list[KV]:
    """The candidates, as pairs that kv heads may choose from.

    Raises:
      KvjaxError: one is no pair of widths of keys and values, or they differ in more than widths.
    """
    pairs = [spec for spec in candidates if isinstance(spec, KV)]
    if len(pairs) < len(candidates) or len({exact(pair) for pair in pairs}) > 1:
        names = ",".join(map(str, candidates))
        raise KvjaxError(f"by=head of {names}; expected pairs that differ in widths alone, as in k8v4,k4v2")
    return pairs


def exact(pair: KV) -> KV:
    """The pair without quantisation."""
    return pair.with_widths(lambda _: EXACT)


def alone(pair: KV, head: int, model: LayerShapes) -> CacheSpec:
    """The spec of a layer with one kv head quantised and the others exact."""
    pairs = (pair if i == head else exact(pair) for i in range(model.kv_heads))
    return PerHead(tuple(pairs)).resolve(model)


def choices(
    pairs: Sequence[KV], bits: Callable[[CacheSpec], float], error: Callable[[int, KV], float], model: LayerShapes
) -> dict[CacheSpec, float]:
    """The specs of a layer that no other beats in both bits and summed error of its heads, with that error.

    Args:
      pairs: what every head may have.
      bits: of a pair that all heads have.
      error: error(head, pair) of one head alone.
      model: sizes of a layer.
    """
    front: list[tuple[tuple[KV, ...], float, float]] = [((), 0.0, 0.0)]
    for head in range(model.kv_heads):
        grown = [
            ((*chosen, pair), cost + bits(pair), total + error(head, pair))
            for chosen, cost, total in front
            for pair in pairs
        ]
        front = pareto(grown, lambda each: round(each[1], 6), lambda each: each[2])  # sums of thirds are not exact
    return {PerHead(chosen).resolve(model): total for chosen, _, total in front}
