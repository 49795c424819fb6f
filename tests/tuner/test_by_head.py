"""A choice for each kv head: the front against all choices, and a search that has both kinds of plans."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax.caches.base import CacheShape, ModelSizes
from kvjax.caches.heads import PerHead
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.calibrated import calibration
from kvjax.models.model import Model
from kvjax.tuner import heads
from kvjax.tuner.search import Search
from kvjax.tuner.settings import SearchSettings
from kvjax.tuner.space import Bits

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAIRS = [KV(8, 8), KV(8, 4), KV(4, 2), KV(2, 2)]
SIZES = ModelSizes(2, 6, 3, 16, 96)


def test_no_choice_of_heads_beats_the_front() -> None:
    rng = np.random.default_rng(0)
    errors = {(head, pair): rng.exponential() / pair.bits_nominal**2 for head in range(3) for pair in PAIRS}
    bits = Bits("asymptotic", 16, CacheShape.of(SIZES, 1, 64, np.float32))
    found = heads.choices(PAIRS, bits.of, lambda head, pair: errors[head, pair], SIZES)
    for spec, error in found.items():
        pairs = spec.pairs if isinstance(spec, PerHead) else (spec,) * 3
        assert error == pytest.approx(sum(errors[head, pair] for head, pair in enumerate(pairs)))
    for pairs in itertools.product(PAIRS, repeat=3):
        cost, error = bits.of(PerHead(pairs).resolve(SIZES)), sum(errors[each] for each in enumerate(pairs))
        assert any(bits.of(spec) <= cost + 1e-9 and known <= error + 1e-12 for spec, known in found.items())


def test_one_head_alone_is_quantised() -> None:
    assert str(heads.alone(KV(4, 2), 1, SIZES)) == "k16v16/k4v2/k16v16@kivi"
    assert heads.alone(KV(4, 2), 0, dataclasses.replace(SIZES, kv_heads=1)) == KV(4, 2)


@pytest.mark.parametrize("names", ["k4v4,k2v2@token", "k4v4,x4@latent", "k4v4,k2v2(sink=4)"])
def test_only_pairs_of_one_form_may_be_chosen_by_head(names: str, model: Model, text: str) -> None:
    with pytest.raises(KvjaxError, match=r"by=head of .*; expected pairs that differ in widths alone"):
        kvjax.tune(model, text, budget=8, candidates=names, by="head", context=64, windows=1)


def test_a_search_by_head_has_both_kinds_of_plans(model: Model, text: str, tmp_path: Path) -> None:
    settings = SearchSettings(budget=4.5, candidates="k8v8,k4v4,k4v2,k2v2", points=2, by="head")
    windows = calibration(model, text, 64, 1, 0)
    search = Search(settings, model, windows, {"text": text}, tmp_path)
    plans = search.plans()
    mixed = [plan for plan in plans if any(isinstance(spec, PerHead) for spec in plan.specs)]
    assert len(mixed) == 1 < len(plans) and mixed[0].bits_nominal <= 4.5
    assert CachePlan.parse(str(mixed[0]), model.config) == mixed[0]
    predicted = search.predicted(mixed[0])
    best = min(filter(search.bits.fits, search.knapsack_front(search.candidates)), key=search.predicted)
    assert predicted is not None and predicted > 0
    assert mixed[0].bits_nominal >= best.bits_nominal  # a choice for each head fills the budget better
    again = Search(settings, model, windows, {"text": text}, tmp_path)
    assert again.plans() == plans and again._simulator is None


def test_pairs_by_head_are_candidates_as_others_are(model: Model, text: str, tmp_path: Path) -> None:
    names = "k8v8,k8v8/k4v4/k4v4/k4v4,k2v2"
    settings = SearchSettings(budget=5, candidates=names, points=2)
    search = Search(settings, model, calibration(model, text, 64, 1, 0), {"text": text}, tmp_path)
    used = {str(spec) for plan in search.plans() for spec in plan.specs}
    assert used <= {"k8v8@kivi", "k8v8/k4v4/k4v4/k4v4@kivi", "k2v2@kivi"} and len(used) > 1
