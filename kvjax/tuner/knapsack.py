"""The whole Pareto front at once, by dynamic programming over the layers.

It takes the error of a plan to be the sum of the errors of its layers, which is accurate enough. The state is what
the layers above depend on (the place in a run of XQuant-CL; nothing for most methods). In each state, all partial
plans are kept that no other beats in both bits and error, so that the front is exact for additive errors.
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
    """A plan for layers 0 to some layer: summed bits and error, the spec of the last layer, the plan below it."""

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
    """Finds the plans that no other beats in both bits and summed error.

    Args:
      candidates: the specs to choose from, per layer, resolved.
      bits: bits of a spec, placed on the layers below it by `cross_layer.stack`.
      error: `error(layer, spec)` is the error of such a spec at a layer.
      model: sizes of the model.

    Returns:
      Plans with their summed errors, most bits first.

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
