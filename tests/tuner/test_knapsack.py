"""The knapsack's front against all plans there are."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.caches.base import CacheShape, CacheSpec
from kvjax.caches.cross_layer import Place
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.models.config import ModelConfig
from kvjax.tuner.knapsack import Error, knapsack, reachable
from kvjax.tuner.space import Bits, resolved

KV_NAMES = ["k8v8", "k8v2@token", "k4v4@kivi(sink=4)", "k2v2", "x4@latent"]
# Runs with base layers 0, 1 and 2; two of one run with different widths; the same run with other base bits.
XCL_NAMES = [
    "xcl3@latent(base=0)",
    "xcl2@latent(base=1)",
    "xcl4@latent(base=1)",
    "xcl2@latent(base=2)",
    "xcl2@latent(base=1,base_bits=8)",
]


def model(layers: int) -> ModelConfig:
    return ModelConfig("llama", 64, 64, 64, layers, 2, 1, 16, 256)


def bits_of(kind: str, layers: int) -> Bits:
    return Bits(kind, 0.0, CacheShape.of(model(layers), 1, 256, jnp.float32))


def random_error(seed: int) -> Error:
    """Any number for any layer and place, on what is below where it is a delta; few, so that some are equal."""

    def error(layer: int, spec: CacheSpec, below: CacheSpec | None) -> float:
        words = [seed, layer, *(zlib.crc32(repr(each).encode()) for each in Place.of(spec, below))]
        return float(np.random.default_rng(words).integers(0, 40))

    return error


def all_plans(candidates: Sequence[Sequence[CacheSpec]], config: ModelConfig) -> list[CachePlan]:
    plans = []
    for specs in itertools.product(*candidates):
        try:
            plans.append(CachePlan.of(specs, config))
        except KvjaxError:
            continue
    return plans


def total(plan: CachePlan, error: Error) -> float:
    pairs = zip(plan.specs, (None, *plan.specs), strict=False)
    return sum(error(layer, *pair) for layer, pair in enumerate(pairs))


def brute_force(plans: Sequence[CachePlan], bits: Bits, error: Error) -> list[tuple[float, float]]:
    """Mean bits and summed errors of the plans that no other beats, most bits first."""
    points = {(round(bits.of_plan(p), 4), total(p, error)) for p in plans}
    front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    return sorted(front, reverse=True)


def check(names: Sequence[Sequence[str]], kind: str, error: Error) -> list[CachePlan]:
    """The front is that of brute force, and its plans are plans with these figures."""
    config, bits = model(len(names)), bits_of(kind, len(names))
    candidates = [[spec for name in choice for spec in settled_alone(name)] for choice in names]
    everything = all_plans(candidates, config)
    front = knapsack(candidates, bits.of, error, config)
    assert [(round(bits.of_plan(plan), 4), summed) for plan, summed in front] == brute_force(everything, bits, error)
    for plan, summed in front:
        assert summed == total(plan, error)
        assert CachePlan.parse(str(plan), config) == plan
        assert plan in everything
    return [plan for plan, _ in front]


def settled_alone(name: str) -> tuple[CacheSpec, ...]:
    return resolved([name], model(4))  # deep enough for every run


@pytest.mark.parametrize("kind", ["nominal", "asymptotic"])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.data())
def test_front_is_that_of_brute_force(kind: str, seed: int, layers: int, data: st.DataObject) -> None:
    choice = st.lists(st.sampled_from(KV_NAMES), min_size=1, max_size=4, unique=True)
    check([data.draw(choice) for _ in range(layers)], kind, random_error(seed))


@pytest.mark.parametrize("kind", ["nominal", "asymptotic"])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 4), st.data())
def test_front_with_runs_of_layers(kind: str, seed: int, layers: int, data: st.DataObject) -> None:
    """What a layer may have depends on the layers below, and what it stores on its place in the run."""
    choice = st.lists(st.sampled_from(["k8v8", *XCL_NAMES]), min_size=1, max_size=4, unique=True)
    drawn = [data.draw(choice) for _ in range(layers)]
    check([sorted({*names, "k8v8"}) for names in drawn], kind, random_error(seed))


def test_a_run_is_taken_where_it_is_best_and_whole() -> None:
    """The delta layers of a run cost nothing, its base layers much: worth it from three layers on."""

    def error(layer: int, spec: CacheSpec, below: CacheSpec | None) -> float:
        if isinstance(spec, KV):
            return 10.0
        return 1.0 if spec.delta else 12.0

    names = ["k4v4", "xcl4@latent(base=1)"]
    for layers, best in ((1, "k4v4"), (2, "k4v4"), (3, "xcl4@latent(base=1)"), (5, "xcl4@latent(base=1)")):
        plans = check([names] * layers, "nominal", error)
        assert plans == [CachePlan.parse(best, model(layers))]


def test_errors_hear_of_specs_in_their_place() -> None:
    heard = set()

    def error(layer: int, spec: CacheSpec, below: CacheSpec | None) -> float:
        heard.add((layer, spec.index, below and below.index))
        return 0.0

    choices = [settled_alone("xcl2@latent(base=1)")] * 4
    knapsack(choices, lambda spec: spec.bits_nominal, error, model(4))
    assert heard == {(0, 0, None), (1, 1, 0), (2, 2, 1), (3, 2, 2)}
    asked = enumerate(reachable(choices))
    assert {(i, spec.index, below and below.index) for i, pairs in asked for spec, below in pairs} == heard


def test_the_error_of_a_delta_depends_on_the_width_below() -> None:
    """What stands on two bits costs ten times as much: then widths alternate, and the last is narrow."""
    names = ["xcl2@latent(base=0)", "xcl4@latent(base=0)"]

    def error(layer: int, spec: CacheSpec, below: CacheSpec | None) -> float:
        return 2.0**-spec.bits_nominal * (10 if spec.delta and below.delta and below.bits == 2 else 1)

    plans = check([names] * 5, "nominal", error)
    assert [[spec.bits for spec in plan.specs[1:]] for plan in plans if plan.bits_nominal == 3.2] == [[4, 2, 4, 2]]


def test_thirty_layers_at_once() -> None:
    """Additive errors that fall with every bit: one more bit goes where it helps most (a convex knapsack)."""
    rng = np.random.default_rng(0)
    weight = rng.random(30)
    specs = resolved(["k8v8", "k6v6", "k4v4", "k2v2"], model(30))
    front = knapsack([specs] * 30, lambda s: s.bits_nominal, lambda i, s, _: weight[i] * 2.0**-s.key_bits, model(30))
    assert len(front) == 91  # from all 2 to all 8, one layer 2 bits more at a time
    widths, error = [2] * 30, weight.sum() / 4
    for plan, found in front[::-1]:
        assert found == pytest.approx(error)
        assert [spec.key_bits for spec in plan.specs] == widths
        gains = [weight[i] * (2.0**-w - 2.0 ** -(w + 2)) if w < 8 else -1 for i, w in enumerate(widths)]
        best = int(np.argmax(gains))
        error, widths[best] = error - gains[best], widths[best] + 2


@pytest.mark.parametrize(
    "names",
    [
        [["xcl2@latent"], ["xcl2@latent"]],  # its base layer would be the third
        [["k4v4", "xcl2@latent(base=1)"], ["k4v4"], ["xcl2@latent(base=1)"]],
        [["xcl2@latent(base=1)"], ["xcl2@latent(base=1,base_bits=8)"], ["xcl2@latent(base=1)"]],
        [["k4v4"], [], ["k4v4"]],
        [],
    ],
    ids=str,
)
def test_candidates_that_make_no_plan(names: list[list[str]]) -> None:
    candidates = [[spec for name in choice for spec in settled_alone(name)] for choice in names]
    with pytest.raises(KvjaxError, match="no plan can be made"):
        knapsack(candidates, lambda spec: spec.bits_nominal, lambda layer, spec, below: 0.0, model(len(names) or 1))
