"""Local search around a plan.

Each round measures the neighbouring candidates of every layer, then combines the best changes by a knapsack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvjax.caches.base import CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.tuner.knapsack import knapsack
from kvjax.tuner.space import Bits, try_plan


def replace_layer(plan: CachePlan, layer: int, spec: CacheSpec, model: ModelShapes) -> CachePlan | None:
    """Replaces the spec of one layer.

    Args:
      plan: the plan.
      layer: the layer.
      spec: the new spec of the layer.
      model: sizes of the model.

    Returns:
      The new plan; None where its layers do not fit together.
    """
    return try_plan([*plan.specs[:layer], spec, *plan.specs[layer + 1 :]], model)


def refine(
    start: CachePlan,
    candidates: Sequence[Sequence[CacheSpec]],
    bits: Bits,
    loss: Callable[[CachePlan], float],
    rounds: int,
    model: ModelShapes,
) -> Iterator[tuple[CachePlan, float]]:
    """Improves a plan, round by round.

    Args:
      start: the plan to start from.
      candidates: the specs to choose from, per layer, in order of bits; the next ones up and down are tried.
      bits: how bits are counted, and the budget.
      loss: evaluates a plan; smaller is better.
      rounds: rounds at most; the search ends earlier where a round finds nothing better.
      model: sizes of the model.

    Yields:
      The start, then ever better plans within the budget, with their losses.
    """
    best, least = start, loss(start)
    yield best, least
    for _ in range(rounds):
        choices, change, measured = _measure(best, least, candidates, loss, model)
        front = knapsack(choices, bits.of, lambda layer, spec, change=change: change[layer, str(spec)], model)  # type: ignore[misc]
        plan = min((each for each in front if bits.fits(each[0])), key=lambda each: each[1], default=(best, 0.0))[0]
        # Losses of several changes do not add up exactly: half of the changes may be better than all of them.
        tried = [plan, *(_part(best, plan, change, model, share) for share in (2, 4))]
        found = [(p, loss(p)) for p in tried if p is not None and bits.fits(p)]
        found += [each for each in measured if bits.fits(each[0])]  # or a single change may be better than several
        plan, better = min(found, key=lambda each: each[1], default=(best, least))
        if better >= least:
            return
        best, least = plan, better
        yield best, least


def _measure(
    best: CachePlan,
    least: float,
    candidates: Sequence[Sequence[CacheSpec]],
    loss: Callable[[CachePlan], float],
    model: ModelShapes,
) -> tuple[list[list[CacheSpec]], dict[tuple[int, str], float], list[tuple[CachePlan, float]]]:
    """Measures the neighbouring candidates of every layer.

    Returns the choices per layer, how much each alone changes the loss, and the plans with one change.
    """
    choices, change, measured = [], {}, []
    for layer, (here, choice) in enumerate(zip(best.specs, candidates, strict=True)):
        names = [str(spec) for spec in choice]
        at = names.index(str(here))
        near = [here]
        change[layer, str(here)] = 0.0
        for i in (at - 1, at + 1):
            if 0 <= i < len(choice) and (plan := replace_layer(best, layer, choice[i], model)):
                near.append(choice[i])
                measured.append((plan, loss(plan)))
                change[layer, names[i]] = measured[-1][1] - least
        choices.append(near)
    return choices, change, measured


def _part(
    best: CachePlan, plan: CachePlan, change: dict[tuple[int, str], float], model: ModelShapes, share: int
) -> CachePlan | None:
    """Applies one part in `share` of the changes from `best` to `plan`.

    Of the changes that lower the loss it applies the best; of those that raise it, the least harmful.
    """
    pairs = enumerate(zip(best.specs, plan.specs, strict=True))
    by = {i: change[i, str(b)] for i, (a, b) in pairs if str(a) != str(b)}
    good, bad = (sorted((i for i in by if (by[i] < 0) == rewards), key=by.__getitem__) for rewards in (True, False))
    kept = {*good[: len(good) // share], *bad[: -(-len(bad) // share)]}
    if not kept:
        return None
    specs = [b if i in kept else a for i, (a, b) in enumerate(zip(best.specs, plan.specs, strict=True))]
    return try_plan(specs, model)
