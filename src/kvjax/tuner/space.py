"""The space of plans: the candidate caches of each layer, how bits are counted, pruning and clustering.

Pruning keeps, layer by layer, the candidates that no other beats in both bits and error (KVTuner, section 5.1, where
the error is e_o).
Clustering lets similar layers share one choice: layers are split by their candidates first, then by DBSCAN on their
errors (section 5.2, appendix D.1.2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from kvjax.caches.base import CacheShape, CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.extras import needed

EPS, MIN_SAMPLES = 0.05, 2  # settings of DBSCAN, as in the paper
PAIRS = (2, 4, 8)

Item = TypeVar("Item")


def default_candidates(mode: str) -> list[str]:
    """Lists KVTuner's nine candidates: 2, 4 or 8 bits for K and for V.

    Args:
      mode: kivi or token.

    Returns:
      Names of the candidates.
    """
    return [f"k{k}v{v}@{mode}" for k in PAIRS[::-1] for v in PAIRS[::-1]]


def resolved(names: Sequence[str], model: ModelShapes) -> tuple[CacheSpec, ...]:
    """Parses the names of candidates and resolves the specs for a model.

    Args:
      names: names in the plan grammar.
      model: sizes of the model.

    Returns:
      The specs.

    Raises:
      KvjaxError: a candidate does not fit the model, or is listed twice.
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
    """Builds the plan of one spec per layer.

    Args:
      specs: a spec per layer.
      model: sizes of the model.

    Returns:
      The plan; None where the specs do not fit together.
    """
    try:
        return CachePlan.of(specs, model)
    except KvjaxError:
        return None


@dataclasses.dataclass(frozen=True)
class Bits:
    """How the bits of a plan are counted, and what it may have.

    Attributes:
      kind: nominal, asymptotic (with scales) or real (all that is allocated for `shape.max_len` tokens).
      budget: the most bits that a plan may have.
      shape: sizes of a cache.
    """

    kind: str
    budget: float
    shape: CacheShape

    def of(self, spec: CacheSpec) -> float:
        if self.kind == "real":
            return _bits_real(spec, self.shape)
        return spec.bits_nominal if self.kind == "nominal" else spec.bits_asymptotic(self.shape)

    def of_plan(self, plan: CachePlan) -> float:
        if self.kind == "real":
            return plan.bits_real(self.shape.max_len)
        return plan.bits_nominal if self.kind == "nominal" else plan.bits_asymptotic

    def fits(self, plan: CachePlan) -> bool:
        return self.of_plan(plan) <= self.budget + 1e-9

    def __str__(self) -> str:
        of = f" of {self.shape.max_len} tokens" if self.kind == "real" else ""
        return f"{self.kind} bits{of}"


@functools.cache
def _bits_real(spec: CacheSpec, shape: CacheShape) -> float:
    """Bits per element of K and V that one layer's cache takes."""
    return 8 * spec.counted_bytes(shape) / (shape.batch * shape.max_len * shape.elements_per_token)


def pareto(items: Iterable[Item], cost: Callable[[Item], float], error: Callable[[Item], float]) -> list[Item]:
    """Finds the Pareto front: the items that no other beats in both cost and error.

    Args:
      items: the items.
      cost: cost of an item.
      error: error of an item.

    Returns:
      The front, highest cost first; of items with equal cost and error, the first.
    """
    front: list[Item] = []
    for item in sorted(items, key=lambda i: (cost(i), error(i))):
        if not front or error(item) < error(front[-1]):
            front.append(item)
    return front[::-1]


def cluster(
    candidates: Sequence[Sequence[CacheSpec]], errors: Sequence[Sequence[float]], noise: str
) -> list[list[int]]:
    """Groups layers with the same candidates and similar errors.

    Args:
      candidates: the candidates of every layer.
      errors: per layer, the error of each of its candidates.
      noise: what to do with layers that resemble no other: "group" puts those with the same candidates into one group
        (as the paper's Table 10 seems to), "singletons" puts each into a group by itself.

    Returns:
      The layers of each group, groups in order of their first layers.
    """
    with needed("sklearn"):
        from sklearn.cluster import DBSCAN  # a second of imports

    groups: list[list[int]] = []
    for choice in dict.fromkeys(map(tuple, candidates)):
        layers = [i for i, each in enumerate(candidates) if tuple(each) == choice]
        labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit_predict(np.array([errors[i] for i in layers]))
        for label in sorted(set(labels)):
            members = [layer for layer, its in zip(layers, labels, strict=True) if its == label]
            alone = label == -1 and noise == "singletons"
            groups += [[layer] for layer in members] if alone else [members]
    return sorted(groups)


def halving_order(count: int) -> list[int]:
    """Orders 0 to count - 1 so that the first few always lie evenly: the bits of each, read backwards."""
    width = (count - 1).bit_length()
    return sorted(range(count), key=lambda i: f"{i:0{width}b}"[::-1])


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Measures the area that points dominate, bounded by a reference; both coordinates are minimised.

    Args:
      points: pairs such as (bits, loss).
      reference: the upper bounds of both coordinates.

    Returns:
      The area.
    """
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area
