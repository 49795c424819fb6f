"""The space of plans: which caches each layer may have, their bits, and which of them are worth searching.

Pruning keeps, layer by layer, the candidates that no other beats in both bits and error (KVTuner, section 5.1).
Clustering lets similar layers share one choice: layers are split by their candidates first, then by DBSCAN on their
errors (section 5.2, appendix D.1.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from kvjax.caches.base import CacheShape, CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError

EPS, MIN_SAMPLES = 0.05, 2  # of DBSCAN, as in the paper
PAIRS = (2, 4, 8)

Item = TypeVar("Item")


def default_candidates(mode: str) -> list[str]:
    """KVTuner's nine pairs, {2, 4, 8} bits of K and V, in `mode` (kivi or token)."""
    return [f"k{k}v{v}@{mode}" for k in PAIRS[::-1] for v in PAIRS[::-1]]


def resolved(names: Sequence[str], model: ModelShapes) -> tuple[CacheSpec, ...]:
    """The specs of candidates' names, resolved for the model.

    Raises:
      KvjaxError: a candidate that the model cannot hold, or one that is there twice.
    """
    specs = []
    for name in names:
        spec = parse_spec(name).resolve(model)
        CachePlan.uniform(spec, model).init_shapes(CacheShape.of(model, 1, 64, np.float32))
        if spec in specs:
            raise KvjaxError(f"candidate {name} is there twice")
        specs.append(spec)
    return tuple(specs)


def try_plan(specs: Sequence[CacheSpec], model: ModelShapes) -> CachePlan | None:
    """The plan of one spec per layer, None where the layers do not go together."""
    try:
        return CachePlan.of(specs, model)
    except KvjaxError:
        return None


@dataclasses.dataclass(frozen=True)
class Bits:
    """What a plan's bits are counted by, and how many it may have.

    kind: "nominal" (the mean of K and V code bits) or "asymptotic" (scales counted).
    """

    kind: str
    budget: float
    shape: CacheShape

    def of(self, spec: CacheSpec) -> float:
        return spec.bits_nominal if self.kind == "nominal" else spec.bits_asymptotic(self.shape)

    def of_plan(self, plan: CachePlan) -> float:
        return plan.bits_nominal if self.kind == "nominal" else plan.bits_asymptotic

    def fits(self, plan: CachePlan) -> bool:
        return self.of_plan(plan) <= self.budget + 1e-9


def pareto(items: Iterable[Item], cost: Callable[[Item], float], error: Callable[[Item], float]) -> list[Item]:
    """The items that no other beats in both cost and error, dearest first; of equals the first."""
    front: list[Item] = []
    for item in sorted(items, key=lambda i: (cost(i), error(i))):
        if not front or error(item) < error(front[-1]):
            front.append(item)
    return front[::-1]


def cluster(
    candidates: Sequence[Sequence[CacheSpec]], errors: Sequence[Sequence[float]], noise: str
) -> list[list[int]]:
    """Groups of layers with the same candidates and similar errors, in order of their first layers.

    candidates, errors: of every layer; errors are of its candidates.
    noise: what becomes of layers that are like no other: "group" (one group of all with the same candidates, which
      the paper's Table 10 looks like) or "singletons".
    """
    from sklearn.cluster import DBSCAN  # a second of imports, for those who need it

    groups: list[list[int]] = []
    for choice in dict.fromkeys(map(tuple, candidates)):
        layers = [i for i, each in enumerate(candidates) if tuple(each) == choice]
        labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit_predict(np.array([errors[i] for i in layers]))
        for label in sorted(set(labels)):
            members = [layer for layer, its in zip(layers, labels, strict=True) if its == label]
            alone = label == -1 and noise == "singletons"
            groups += [[layer] for layer in members] if alone else [members]
    return sorted(groups)


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that points (both to be made small) dominate below and left of the reference."""
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area
