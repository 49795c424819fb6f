"""A plan made better by measuring around it: each layer's next candidates, then a knapsack of what they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvjax.caches.base import CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.tuner.knapsack import knapsack
from kvjax.tuner.space import Bits, try_plan


def replace_layer(plan: CachePlan, layer: int, spec: CacheSpec, model: ModelShapes) -> CachePlan | None:
    """The plan with another spec at one layer, None where the layers then do not go together."""
    return try_plan([*plan.specs[:layer], spec, *plan.specs[layer + 1 :]], model)


def refine(
    start: CachePlan,
    candidates: Sequence[Sequence[CacheSpec]],
    bits: Bits,
    loss: Callable[[CachePlan], float],
    rounds: int,
    model: ModelShapes,
) -> Iterator[tuple[CachePlan, float]]:
    """The start and ever better plans within the budget, with their losses.

    candidates: of every layer, in order of bits; the next ones up and down are tried.
    """
    best, least = start, loss(start)
    yield best, least
    for _ in range(rounds):
        choices, change, measured = _measure(best, least, candidates, loss, model)
        front = knapsack(choices, bits.of, lambda layer, spec, change=change: change[layer, str(spec)], model)  # type: ignore[misc]
        plan = min((each for each in front if bits.fits(each[0])), key=lambda each: each[1], default=(best, 0.0))[0]
        # What changes together does not add up exactly: half the changes may be better than all.
        tried = [plan, *(_part(best, plan, change, model, share) for share in (2, 4))]
        found = [(p, loss(p)) for p in tried if p is not None and bits.fits(p)]
        found += [each for each in measured if bits.fits(each[0])]  # or one change may be better than more
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
    """Each layer's choices around a plan, by how much each alone changes its loss, and the plans with one change."""
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
    """The plan that keeps of the changes from `best` to `plan` one part in `share`: the most rewarding ones of those
    that reward, the least harmful ones of those that harm.
    """
    pairs = enumerate(zip(best.specs, plan.specs, strict=True))
    by = {i: change[i, str(b)] for i, (a, b) in pairs if str(a) != str(b)}
    good, bad = (sorted((i for i in by if (by[i] < 0) == rewards), key=by.__getitem__) for rewards in (True, False))
    kept = {*good[: len(good) // share], *bad[: -(-len(bad) // share)]}
    if not kept:
        return None
    specs = [b if i in kept else a for i, (a, b) in enumerate(zip(best.specs, plan.specs, strict=True))]
    return try_plan(specs, model)
