"""Local search around a plan.

Each round measures the errors of layers around the best plan, for every layer's next widths, and combines the best
changes by a knapsack. What a round finds counts only where its measured loss is less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvjax.caches.base import CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.tuner.knapsack import Error, knapsack
from kvjax.tuner.space import Bits, try_plan

SHARES = (2, 4)  # of the changes: losses of several do not add up exactly, half of them may be better than all


def refine(
    start: CachePlan,
    neighbours: Callable[[CacheSpec], list[CacheSpec]],
    bits: Bits,
    loss: Callable[[CachePlan], float],
    linearise: Callable[[CachePlan, list[list[CacheSpec]]], Error],
    rounds: int,
    model: ModelShapes,
) -> Iterator[tuple[CachePlan, float]]:
    """Improves a plan, round by round.

    Args:
      start: the plan to start from.
      neighbours: what may take the place of a spec in one round, itself among it; see `near`.
      bits: how bits are counted, and the budget.
      loss: evaluates a plan; smaller is better.
      linearise: the errors of layers around a plan, for each layer's choices.
      rounds: rounds at most; the search ends earlier where a round finds nothing better.
      model: sizes of the model.

    Yields:
      The start, then ever better plans within the budget, with their losses.
    """
    best, least = start, loss(start)
    yield best, least
    for _ in range(rounds):
        choices = [neighbours(spec) for spec in best.specs]
        error = linearise(best, choices)
        plan = next((plan for plan, _ in knapsack(choices, bits.of, error, model) if bits.fits(plan)), best)
        tried = [plan, *(_part(best, plan, error, model, share) for share in SHARES)]
        found = [(each, loss(each)) for each in dict.fromkeys(tried) if each and each != best and bits.fits(each)]
        plan, better = min(found, key=lambda each: each[1], default=(best, least))
        if better >= least:
            return
        best, least = plan, better
        yield best, least


def near(spec: CacheSpec, candidates: Sequence[CacheSpec], size: Callable[[CacheSpec], float]) -> list[CacheSpec]:
    """The candidates that differ from a layer's spec in widths alone, and by one step of their bits at most.

    Args:
      spec: of the layer; one of the candidates in its place.
      candidates: the specs to choose from.
      size: the bits of a candidate.
    """
    own = next(each for each in candidates if str(each) == str(spec))
    alike = [each for each in candidates if each.program_form == own.program_form]
    steps = sorted({round(size(each), 6) for each in alike})
    at = {each: steps.index(round(size(each), 6)) for each in alike}
    return [each for each in alike if abs(at[each] - at[own]) <= 1]


def _part(best: CachePlan, plan: CachePlan, error: Error, model: ModelShapes, share: int) -> CachePlan | None:
    """Applies one part in `share` of the changes from `best` to `plan`.

    Of the changes that lower the error it applies the best; of those that raise it, the least harmful.
    """
    by = {
        layer: _at(error, layer, plan) - _at(error, layer, best)
        for layer, (a, b) in enumerate(zip(best.specs, plan.specs, strict=True))
        if str(a) != str(b)
    }
    good, bad = (sorted((i for i in by if (by[i] < 0) == rewards), key=by.__getitem__) for rewards in (True, False))
    kept = {*good[: len(good) // share], *bad[: -(-len(bad) // share)]}
    if not kept:
        return None
    specs = [b if i in kept else a for i, (a, b) in enumerate(zip(best.specs, plan.specs, strict=True))]
    return try_plan(specs, model)


def _at(error: Error, layer: int, plan: CachePlan) -> float:
    """The error of a plan's layer."""
    return error(layer, plan.specs[layer], plan.specs[layer - 1] if layer else None)
