"""Refinement under losses that are known everywhere: sums over layers and what pairs of layers add to them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.caches.base import CacheShape, CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.models.config import ModelConfig
from kvjax.tuner.knapsack import Error, knapsack
from kvjax.tuner.refine import near, refine
from kvjax.tuner.space import Bits, resolved, try_plan

LADDER = ["k2v2", "k4v2", "k4v4", "k8v8"]
EVEN = ["k2v2", "k4v4", "k6v6", "k8v8"]
# In order of bits; runs of at least two layers with `base=1`, whose widths above the base may differ.
RUNS = ["xcl2@latent(base=1,base_bits=3)", "xcl3@latent(base=1,base_bits=3)", "k4v4", "k8v8"]


def model(layers: int) -> ModelConfig:
    return ModelConfig("llama", 64, 64, 64, layers, 2, 1, 16, 256)


def bits_of(budget: float, layers: int, kind: str = "nominal") -> Bits:
    return Bits(kind, budget, CacheShape.of(model(layers), 1, 256, jnp.float32))


@dataclasses.dataclass
class Loss:
    """sum_i alone[i, spec] + sum_ij pairs[i, j] e_i e_j with e = 2^-bits; remembers what it was asked."""

    alone: np.ndarray  # [layer, position of the spec in `names`]
    pairs: np.ndarray
    names: list[str]
    asked: list[CachePlan] = dataclasses.field(default_factory=list)

    @classmethod
    def random(cls, seed: int, layers: int, names: list[str], strength: float) -> Loss:
        rng = np.random.default_rng(seed)
        pairs = strength * rng.standard_normal((layers, layers))
        return cls(rng.random((layers, len(names))), pairs, [str(spec) for spec in specs_of(names)])

    def of(self, plan: CachePlan) -> float:
        at = [self.names.index(str(spec)) for spec in plan.specs]
        e = np.array([2.0**-spec.bits_nominal for spec in plan.specs])
        return float(self.alone[np.arange(len(at)), at].sum() + e @ self.pairs @ e)

    def __call__(self, plan: CachePlan) -> float:
        self.asked.append(plan)
        return self.of(plan)


def specs_of(names: list[str]) -> list[CacheSpec]:
    return [resolved([name], model(4))[0] for name in names]


def top(spec: CacheSpec) -> float:
    """The bits of a candidate above the base of its run."""
    return CachePlan.uniform(spec, model(4)).specs[-1].bits_nominal


def improved(
    start: CachePlan,
    specs: Sequence[CacheSpec],
    bits: Bits,
    loss: Callable[[CachePlan], float],
    rounds: int,
    layers: int,
) -> Iterator[tuple[CachePlan, float]]:
    """Refined with what each single change adds to the loss; that is known, and not asked for."""
    of = getattr(loss, "of", loss)

    def linearise(plan: CachePlan, choices: list[list[CacheSpec]]) -> Error:
        def error(layer: int, spec: CacheSpec, below: CacheSpec | None) -> float:
            changed = try_plan([*plan.specs[:layer], spec, *plan.specs[layer + 1 :]], model(layers))
            return of(changed) - of(plan) if changed else 0.0

        return error

    neighbours = functools.partial(near, candidates=specs, size=top)
    return refine(start, neighbours, bits, loss, linearise, rounds, model(layers))


def all_plans(names: list[str], layers: int) -> list[CachePlan]:
    plans = []
    for specs in itertools.product(specs_of(names), repeat=layers):
        try:
            plans.append(CachePlan.of(specs, model(layers)))
        except KvjaxError:
            continue
    return plans


PLANS = {
    (tuple(names), layers): all_plans(names, layers) for names in (LADDER, EVEN, RUNS) for layers in (1, 2, 3, 4)
}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    names=st.sampled_from([LADDER, RUNS]),
    layers=st.integers(1, 4),
    strength=st.sampled_from([0.0, 1.0, 10.0]),
    kind=st.sampled_from(["nominal", "asymptotic"]),
    share=st.floats(0, 1),
    rounds=st.integers(0, 4),
    first=st.integers(0, 10**6),
)
def test_never_worse_within_the_budget_and_only_plans(
    seed: int, names: list[str], layers: int, strength: float, kind: str, share: float, rounds: int, first: int
) -> None:
    plans, loss = PLANS[tuple(names), layers], Loss.random(seed, layers, names, strength)
    sizes = [bits_of(0, layers, kind).of_plan(plan) for plan in plans]
    bits = bits_of(min(sizes) + share * (max(sizes) - min(sizes)), layers, kind)
    start = plans[first % len(plans)]  # not always within the budget
    found = list(improved(start, specs_of(names), bits, loss, rounds, layers))
    assert found[0] == (start, loss.of(start)) and loss.asked[0] == start
    losses = [least for _, least in found]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses) <= rounds + 1
    for plan, least in found:
        assert least == loss.of(plan)
        assert bits.fits(plan) or plan is start
    assert all(plan in plans for plan in loss.asked)
    assert len(loss.asked) <= 1 + 3 * rounds


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_where_the_errors_were_wrong(seed: int) -> None:
    """Losses that fall with bits as real ones do; the knapsack was told those of the layers in reverse."""
    rng, layers = np.random.default_rng(seed), 4
    weight = np.sort(10.0 ** rng.uniform(-1, 1, layers))
    specs = specs_of(EVEN)
    loss, bits = Loss.random(seed, layers, EVEN, 0.1), bits_of(4, layers)
    loss.alone[:] = weight[:, None] * [2.0**-spec.bits_nominal for spec in specs]
    wrong = knapsack([specs] * layers, bits.of, lambda i, s, _: weight[-1 - i] * 2.0**-s.bits_nominal, model(layers))
    start = next(plan for plan, _ in wrong if bits.fits(plan))
    best = min((plan for plan in PLANS[tuple(EVEN), layers] if bits.fits(plan)), key=loss.of)
    *_, (plan, _) = found = list(improved(start, specs, bits, loss, 10, layers))
    assert plan == best
    assert len(found) > 2 and found[0][1] > 1.2 * found[-1][1]


def test_half_the_changes_where_all_are_too_many() -> None:
    """Each odd layer up and each even one down helps, but to change more than four layers costs."""
    layers, ladder = 8, specs_of(["k2v2", "k4v4", "k6v6"])
    start = CachePlan.of([ladder[1]] * layers, model(layers))
    changed = []

    def loss(plan: CachePlan) -> float:
        up = np.array([spec.key_bits / 2 - 2 for spec in plan.specs])
        changed.append(int(np.abs(up).sum()))
        return float(10 - 2 * up[1::2].sum() - 0.5 * up[::2].sum() + 5 * max(0, changed[-1] - 4))

    bits = bits_of(4.0, layers)
    _, (plan, after) = improved(start, ladder, bits, loss, 1, layers)
    assert max(changed) == 8
    assert [spec.key_bits for spec in plan.specs].count(6) == [spec.key_bits for spec in plan.specs].count(2) == 2
    assert after == 10 - 2 * 2 + 0.5 * 2


def test_parts_of_the_changes_have_to_fit_too() -> None:
    """One layer up costs the bits of two down: half of two up and four down, one of each, is too much."""
    ladder, asked = specs_of(["k2v2", "k4v4", "k8v8"]), []
    start = CachePlan.of([ladder[1]] * 6, model(6))

    def loss(plan: CachePlan) -> float:
        asked.append(plan)
        widths = [spec.key_bits for spec in plan.specs]
        changes = 6 - widths.count(4)
        return 10 - 2 * widths[:2].count(8) + 0.1 * widths[2:].count(2) + 100 * (changes > 2) + widths[:2].count(2)

    bits = bits_of(4.0, 6)
    found = list(improved(start, ladder, bits, loss, 3, 6))
    assert all(bits.fits(plan) for plan, _ in found)
    assert CachePlan.parse("0-1:k8v8;2-5:k2v2", model(6)) in asked


def test_ends_where_nothing_is_better() -> None:
    loss = Loss.random(0, 4, LADDER, 0.0)
    loss.alone[:] = 2.0 ** -np.arange(4)  # more is better, and the start has all there is
    start = CachePlan.parse("k8v8", model(4))
    found = list(improved(start, specs_of(LADDER), bits_of(8, 4), loss, 100, 4))
    assert found == [(start, loss.of(start))]
    assert len(loss.asked) < 10


def names_of(specs: Sequence[CacheSpec]) -> set[str]:
    return {str(spec) for spec in specs}


def test_near_are_the_next_widths_of_the_same_form() -> None:
    pairs = specs_of([f"k{k}v{v}" for k in (2, 4, 8) for v in (2, 4, 8)] + ["k4v2@token", "k4v2@kivi(sink=4)"])
    found = names_of(near(pairs[4], pairs, top))  # k4v4: 8 bits, next to k2v4 and k4v2, k2v8 and k8v2
    assert found == {f"{name}@kivi" for name in ("k4v4", "k2v4", "k4v2", "k2v8", "k8v2")}
    runs = specs_of(
        [f"xcl{b}@latent(base={base})" for base in (0, 1) for b in (2, 3, 5, 8)]
        + ["xcl3@latent(base=0,base_bits=8)", "xcl3@latent(base=0,sink=4)"]
    )
    plan = CachePlan.uniform(runs[1], model(4))
    wanted = {f"xcl{b}@latent(base={base})" for base in (0, 1) for b in (2, 3, 5)}
    wanted |= {"xcl3@latent(base=0,base_bits=8)"}
    for spec in plan.specs:  # whatever a layer's place in its run
        assert {str(resolved([name], model(4))[0]) for name in wanted} == names_of(near(spec, runs, top))
