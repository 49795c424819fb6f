"""The whole Pareto front at once, by dynamic programming over the layers.

It takes the error of a plan to be the sum of the errors of its layers. The error of a layer may depend on the spec
of the layer below: a delta of XQuant-CL is taken from what that left. So the state is what the layers above depend on
(the place in a run of XQuant-CL, and above its base the width; nothing for most methods). In each state, all partial
plans are kept that no other beats in both bits and error, so that the front is exact for such errors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kvjax.caches import cross_layer
from kvjax.caches.base import CacheSpec, ModelShapes, ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError

Error = Callable[[int, CacheSpec, CacheSpec | None], float]
"""error(layer, spec, below): of a spec that is stacked on the one below, None at the first layer."""


@dataclasses.dataclass(frozen=True)
class Front:
    """Partial plans for layers 0 to some layer that end in one state.

    Attributes:
      spec: of the last layer of one of them: the layers above depend on none of its differences from the others'.
      bits, error: the sums over the layers.
      move, row: of each, the last layer's of `moves`, and the partial plan of that move's front that it extends.
      moves: every front of the layer below with a spec that is stacked on it.
    """

    spec: CacheSpec | None
    bits: Float[np.ndarray, "n"]
    error: Float[np.ndarray, "n"]
    move: Int[np.ndarray, "n"]
    row: Int[np.ndarray, "n"]
    moves: list[tuple[Front, CacheSpec]]

    @classmethod
    def join(cls, moves: list[tuple[Front, CacheSpec]], costs: list[tuple[float, float]]) -> Front:
        """What moves lead to, each with its bits and error, without those that another beats; most bits first."""
        bits = np.concatenate([below.bits + cost[0] for (below, _), cost in zip(moves, costs, strict=True)])
        error = np.concatenate([below.error + cost[1] for (below, _), cost in zip(moves, costs, strict=True)])
        sizes = [len(below.bits) for below, _ in moves]
        move, row = np.repeat(np.arange(len(moves)), sizes), np.concatenate([np.arange(size) for size in sizes])
        order = np.lexsort((error, bits.round(6)))  # sums of thirds are not exact
        least = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
        kept = order[error[order] < least][::-1]
        return cls(moves[0][1], bits[kept], error[kept], move[kept], row[kept], moves)

    def specs(self, row: int) -> tuple[CacheSpec, ...]:
        """Of a partial plan, layer by layer."""
        found: list[CacheSpec] = []
        front = self
        while front.moves:
            below, spec = front.moves[front.move[row]]
            found.append(spec)
            front, row = below, front.row[row]
        return tuple(found[::-1])


@functools.lru_cache(maxsize=2**12)  # most layers have the same choice
def stacked(below: CacheSpec | None, choice: tuple[CacheSpec, ...]) -> list[tuple[Any, CacheSpec]]:
    """The specs that may stand on one below, in their place, with the states that they lead to; each place once."""
    found, seen = [], set()
    for spec in choice:
        placed = cross_layer.stack(spec, below)
        state = cross_layer.run_key(placed)
        if (below is None or cross_layer.fits_under(below, placed)) and (state is None or state not in seen):
            seen.add(state)
            found.append((state, placed))
    return found


def reachable(candidates: Sequence[Sequence[CacheSpec]]) -> list[list[tuple[CacheSpec, CacheSpec | None]]]:
    """Per layer, the arguments that `knapsack` calls `error` with: specs in their place, and those below."""
    states: dict[Any, CacheSpec | None] = {None: None}
    found = []
    for choice in candidates:
        moves = [(below, *move) for below in states.values() for move in stacked(below, tuple(choice))]
        found.append([(spec, below) for below, _, spec in moves])
        states = {state: spec for _, state, spec in reversed(moves)}
    return found


def knapsack(
    candidates: Sequence[Sequence[CacheSpec]], bits: Callable[[CacheSpec], float], error: Error, model: ModelShapes
) -> list[tuple[CachePlan, float]]:
    """Finds the plans that no other beats in both bits and summed error.

    Args:
      candidates: the specs to choose from, per layer, resolved.
      bits: bits of a spec, placed on the layers below it by `cross_layer.stack`.
      error: the error of a layer.
      model: sizes of the model.

    Returns:
      Plans with their summed errors, most bits first.

    Raises:
      KvjaxError: no plan can be made of the candidates.
    """
    nothing = np.zeros(1, int)
    states: dict[Any, Front] = {None: Front(None, np.zeros(1), np.zeros(1), nothing, nothing, [])}
    for layer, choice in enumerate(candidates):
        grown: dict[Any, tuple[list[tuple[Front, CacheSpec]], list[tuple[float, float]]]] = {}
        for below in states.values():
            for state, spec in stacked(below.spec, tuple(choice)):
                moves, costs = grown.setdefault(state, ([], []))
                moves.append((below, spec))
                costs.append((bits(spec), error(layer, spec, below.spec)))
        states = {state: Front.join(*each) for state, each in grown.items()}
    ended = [front for front in states.values() if front.spec and cross_layer.fits_under(front.spec, None)]
    if not ended:
        raise KvjaxError("no plan can be made of these candidates")
    sizes = ModelSizes.of(model)
    return [(CachePlan(front.specs(row), sizes), float(front.error[row])) for front, row in _undominated(ended)]


def _undominated(fronts: Sequence[Front]) -> list[tuple[Front, int]]:
    """The partial plans of fronts that no other of any front beats, most bits first."""
    whole = Front.join([(front, front.spec) for front in fronts if front.spec], [(0.0, 0.0)] * len(fronts))
    return [(fronts[move], int(row)) for move, row in zip(whole.move, whole.row, strict=True)]
