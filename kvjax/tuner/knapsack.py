"""The whole front at once: errors of single layers add up well enough for dynamic programming over the layers.

State: what the layers above depend on (a place in a run of XQuant-CL; nothing for most methods). Of each state the
partial plans that no other beats in both bits and error are kept, so that the front is exact for additive errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvjax.caches import cross_layer
from kvjax.caches.base import CacheSpec, ModelShapes, ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.tuner.space import pareto


class PartialPlan(NamedTuple):
    """Layers 0 to some layer: summed bits and error, the last spec and the layers below it."""

    bits: float
    error: float
    spec: CacheSpec | None = None
    below: PartialPlan | None = None

    @property
    def specs(self) -> tuple[CacheSpec, ...]:
        found: list[CacheSpec] = []
        node: PartialPlan | None = self
        while node is not None and node.spec is not None:
            found.append(node.spec)
            node = node.below
        return tuple(found[::-1])


def knapsack(
    candidates: Sequence[Sequence[CacheSpec]],
    bits: Callable[[CacheSpec], float],
    error: Callable[[int, CacheSpec], float],
    model: ModelShapes,
) -> list[tuple[CachePlan, float]]:
    """The front of plans under the sum of `error(layer, spec)`, with that sum, most bits first.

    Args:
      candidates: of every layer, resolved.
      bits, error: of a spec on top of the layers below it, see `cross_layer.stack`.

    Raises:
      KvjaxError: no plan can be made of the candidates.
    """
    states: dict[Any, list[PartialPlan]] = {None: [PartialPlan(0.0, 0.0)]}
    for layer, choice in enumerate(candidates):
        grown: dict[Any, list[PartialPlan]] = {}
        for partials in states.values():
            below = partials[0].spec
            for spec in choice:
                placed = cross_layer.stack(spec, below)
                if below is not None and not cross_layer.fits_under(below, placed):
                    continue
                more_bits, more_error = bits(placed), error(layer, placed)
                grown.setdefault(cross_layer.run_key(placed), []).extend(
                    PartialPlan(p.bits + more_bits, p.error + more_error, placed, p) for p in partials
                )
        states = {state: _front(each) for state, each in grown.items()}
    ended = [
        p for each in states.values() for p in each if p.spec is not None and cross_layer.fits_under(p.spec, None)
    ]
    if not ended:
        raise KvjaxError("no plan can be made of these candidates")
    return [(CachePlan(p.specs, ModelSizes.of(model)), p.error) for p in _front(ended)]


def _front(partials: list[PartialPlan]) -> list[PartialPlan]:
    return pareto(partials, lambda p: round(p.bits, 6), lambda p: p.error)  # sums of thirds are not exact
