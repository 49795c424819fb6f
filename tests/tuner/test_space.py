"""Candidates, their bits, fronts, groups of layers and dominated areas, against brute force."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.models.config import ModelConfig
from kvjax.tuner.space import Bits, cluster, default_candidates, halving_order, hypervolume, pareto, resolved

MODEL = ModelConfig("llama", 64, 48, 64, 3, 2, 1, 24, 256)
SHAPE = CacheShape.of(MODEL, 1, 256, jnp.float32)
points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


# ---- candidates


@pytest.mark.parametrize("mode", ["kivi", "token"])
def test_default_candidates_are_kvtuners_nine_pairs(mode: str) -> None:
    specs = resolved(default_candidates(mode), MODEL)
    assert {spec.mode for spec in specs} == {mode}
    assert sorted((s.key_bits, s.value_bits) for s in specs) == sorted(itertools.product((2, 4, 8), repeat=2))


def test_settled_fills_in_what_the_model_says() -> None:
    specs = resolved(["k4v4", "x4", "xcl3(base=0)", "dense", "k4v4@kivi(residual=64)"], MODEL)
    assert [str(s) for s in specs] == [
        "k4v4@kivi",
        "x4@latent",
        "xcl3@latent(base=0)",
        "dense",
        "k4v4@kivi(residual=64)",
    ]
    assert [s.residual_length for s in specs] == [32, 64, 0, 0, 64]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["k4v4@kivi(group=16)"], "group 16 does not divide the head_dim of 24"),
        (["k4v4@token(group=32)"], "group 32 does not divide the head_dim of 24"),
        (["x4@input(group=32)"], "group 32 does not divide the 48 channels"),
        (["k4v4@kivi", "k4v4"], "k4v4 is there twice"),
        (["k4v4@kivi", "k8v8", "k4v4@kivi(residual=32)"], r"k4v4@kivi\(residual=32\) is there twice"),
        (["x4", "x4@latent"], "x4@latent is there twice"),
        (["xcl3(base=3)"], "has no base layer 3"),
        (["k7v4"], "key_bits=7; expected 1, 2"),
        (["k4"], "is not known"),
    ],
)
def test_settled_refuses(names: list[str], message: str) -> None:
    with pytest.raises(KvjaxError, match=message):
        resolved(names, MODEL)


# ---- bits


def test_bits_of_a_plan_are_the_mean_of_its_layers() -> None:
    plan = CachePlan.parse("0:k8v4@kivi;1:k4v2@token;2:dense", MODEL)
    nominal, asymptotic = Bits("nominal", 26 / 3, SHAPE), Bits("asymptotic", 9.0, SHAPE)
    assert [nominal.of(spec) for spec in plan.specs] == [6, 3, 16]
    # A scale and a zero point of 16 bits each for groups of 32 tokens, of 24 channels.
    expected = [(8 + 32 / 32 + 4 + 32 / 24) / 2, (4 + 2 + 2 * 32 / 24) / 2, 16]
    np.testing.assert_allclose([asymptotic.of(spec) for spec in plan.specs], expected)
    for bits in (nominal, asymptotic):
        assert bits.of_plan(plan) == pytest.approx(np.mean([bits.of(spec) for spec in plan.specs]))
    assert nominal.fits(plan) and not asymptotic.fits(plan)  # 25 / 3 and 27.5 / 3


def test_a_budget_is_met_exactly_and_not_exceeded() -> None:
    plan = CachePlan.parse("0-1:k4v4;2:k4v2", MODEL)
    assert Bits("nominal", 11 / 3, SHAPE).fits(plan)
    assert not Bits("nominal", 11 / 3 - 1e-6, SHAPE).fits(plan)


# ---- fronts


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@settings(max_examples=200, deadline=None)
@given(points)
@example([(1, 2), (1, 1), (0, 2), (0, 3)])
def test_pareto(items: list[tuple[int, int]]) -> None:
    """Against brute force; numbered, to see that of equals the first is kept."""
    front = pareto(list(enumerate(items)), lambda item: item[1][0], lambda item: item[1][1])
    kept = {p for p in items if not any(beats(other, p) for other in items)}
    assert front == [(items.index(p), p) for p in sorted(kept, reverse=True)]


@pytest.mark.parametrize(("count", "order"), [(0, []), (1, [0]), (5, [0, 4, 2, 1, 3]), (8, [0, 4, 2, 6, 1, 5, 3, 7])])
def test_halving_order(count: int, order: list[int]) -> None:
    assert halving_order(count) == order


@settings(max_examples=100, deadline=None)
@given(points, st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_hypervolume(items: list[tuple[int, int]], reference: tuple[int, int]) -> None:
    """Counts the unit squares that some point dominates."""
    squares = itertools.product(range(reference[0]), range(reference[1]))
    area = sum(any(x <= a and y <= b for x, y in items) for a, b in squares)
    assert hypervolume(items, reference) == area
    assert hypervolume(pareto(items, lambda p: p[0], lambda p: p[1]), reference) == area


# ---- groups

A, B, C = resolved(["k8v8", "k4v4", "k2v2"], MODEL)


def test_layers_are_split_by_their_candidates_first() -> None:
    same = [0.1, 0.2]
    candidates = [[A, B], [A, C], [A, B], [A, C], [A, B, C]]
    assert cluster(candidates, [same] * 4 + [[0.1, 0.2, 0.3]], "singletons") == [[0, 2], [1, 3], [4]]


def test_groups_are_chains_of_neighbours_within_eps() -> None:
    """DBSCAN: 0.05 joins, a chain joins, distance is Euclidean."""
    one = [[A]] * 6
    assert cluster(one, [[0.0], [0.5], [0.049], [0.098], [0.5499], [0.9]], "group") == [[0, 2, 3], [1, 4], [5]]
    assert cluster(one[:2], [[0.0], [0.051]], "singletons") == [[0], [1]]
    two = [[A, B]] * 4
    assert cluster(two, [[0, 0], [0.04, 0.04], [1, 0], [1.03, 0.03]], "singletons") == [[0], [1], [2, 3]]


@pytest.mark.parametrize(
    ("noise", "groups"), [("group", [[0, 3, 6], [1, 4], [2, 5]]), ("singletons", [[0], [1, 4], [2, 5], [3], [6]])]
)
def test_layers_like_no_other(noise: str, groups: list[list[int]]) -> None:
    errors = [[9.0], [0.5], [0.1], [5.0], [0.52], [0.12], [7.0]]
    assert cluster([[A]] * 7, errors, noise) == groups


def test_layers_like_no_other_are_grouped_by_their_candidates_too() -> None:
    candidates = [[A], [B], [A], [B]]
    assert cluster(candidates, [[0.0], [1.0], [2.0], [3.0]], "group") == [[0, 2], [1, 3]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([(A,), (A, B), (B, A, C)]), st.integers(0, 20)), min_size=1, max_size=12),
    st.sampled_from(["group", "singletons"]),
)
def test_groups_hold_every_layer_once_and_one_kind(layers: list, noise: str) -> None:
    candidates = [choice for choice, _ in layers]
    groups = cluster(candidates, [[level * 0.03] * len(choice) for choice, level in layers], noise)
    assert sorted(layer for group in groups for layer in group) == list(range(len(layers)))
    assert all(group == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert all(len({candidates[layer] for layer in group}) == 1 for group in groups)
