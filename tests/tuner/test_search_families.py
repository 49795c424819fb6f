"""Searches over several methods at once: starts, rounds, the windows that choose, and the three kinds of bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax import records
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.calibrated import calibration
from kvjax.models.model import Model
from kvjax.tuner import judge
from kvjax.tuner.card import CALIBRATION
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.search import FINALISTS, Search
from kvjax.tuner.settings import SearchSettings
from kvjax.tuner.simulate import Simulator

FAMILIES = {
    "K and V": "k8v8,k4v4,k2v2",
    "latents": "x2@input,x4@input,x8@input",
    "deltas": "xcl2(base=0),xcl3(base=0),xcl5(base=0)",
}
pytestmark = pytest.mark.usefixtures("quick_compilation")
PLACE: dict[str, Any] = {"context": 64, "windows": 1}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def windows(model: Model, text: str) -> np.ndarray:
    return calibration(model, text, PLACE["context"], PLACE["windows"], 0)


@pytest.fixture(scope="module")
def searching(model: Model, windows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Search]:
    """Searches that share what was measured."""
    folder, simulator = tmp_path_factory.mktemp("shared"), Simulator(model, windows)

    def make(**settings: Any) -> Search:
        search = Search(SearchSettings.of(settings), model, windows, {}, folder)
        search._simulator = simulator
        return search

    return make


@pytest.mark.parametrize("budget", [3.0, 4.0])
def test_all_together_do_not_lose_to_one_family(budget: float, searching: Callable[..., Search]) -> None:
    asked: Row = {"method": "refine", "budget": budget, "budget_of": "asymptotic", "rounds": 2}
    alone = {}
    for name, candidates in FAMILIES.items():
        try:
            search = searching(candidates=candidates, **asked)
        except KvjaxError:
            continue  # all of it is beyond the budget
        alone[name] = search.loss(search.choose(search.plans()))
    together = searching(candidates=",".join(FAMILIES.values()), **asked)
    plan = together.choose(together.plans())
    assert len(alone) >= 2 and together.loss(plan) <= min(alone.values())
    assert together.bits.of_plan(plan) <= budget


def test_rounds_find_what_the_first_errors_miss(searching: Callable[..., Search]) -> None:
    """Each plan of a family is better than the one before it, and is predicted around that one."""
    search = searching(candidates=FAMILIES["deltas"], method="refine", budget=3.0)
    plans = search.plans()
    losses = [search.loss(plan) for plan in plans]
    assert losses == sorted(losses, reverse=True)
    around = {row["around"] for row in records.read_rows(search.folder / "sensitivity.jsonl")}
    assert {"dense", str(plans[0])} <= around


@pytest.mark.parametrize("candidates", [FAMILIES["K and V"], ",".join(FAMILIES.values())])
def test_predictions_are_of_the_same_size_as_what_is_measured(
    candidates: str, searching: Callable[..., Search]
) -> None:
    search = searching(candidates=candidates, budget=8.0)
    search.errors()
    for plan in search.uniform:
        if (measured := search.evaluations(plan)["kld"]) > 1e-4:
            predicted = search.predicted(plan)
            assert predicted and 0.2 < predicted / measured < 5


# ---- the windows that choose


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """KL on the calibrated windows is as the bits have it; on the others it is what the test says, else 1."""
    elsewhere: dict[str, float] = {}

    def evaluate(self: Search, plan: CachePlan) -> Row:
        return {"kld": 4.0**-plan.bits_nominal, "nll": 1.0, "top1": 0.5, "seconds": 0.1}

    def other(model: Model, text: str, cut: np.ndarray, windows: int, offset: int, folder: Path) -> Evaluations:
        def figures(plan: CachePlan) -> Row:
            return {"kld": elsewhere.get(str(plan), 1.0), "nll": 1.0, "top1": 0.5}

        identity = {key: getattr(cut, key, text) for key in CALIBRATION} | {"windows": windows, "offset": offset}
        return Evaluations(folder, {key: str(value) for key, value in identity.items()}, figures)

    monkeypatch.setattr(Search, "_evaluate", evaluate)
    monkeypatch.setattr(judge, "_evaluations", other)
    return elsewhere


def test_other_windows_choose_among_the_best(
    invented: dict[str, float], model: Model, text: str, tmp_path: Path
) -> None:
    asked: Row = {"candidates": "k8v8,k6v6,k5v5,k4v4,k3v3,k2v2", "budget": 8, "method": "nsga2", "prune": "none"}
    asked |= {"cluster": "none", "trials": 1} | PLACE
    invented |= {"k5v5@kivi": 0.1, "k2v2@kivi": 0.01}
    tuning = kvjax.tune(model, text, **asked, folder=tmp_path, validation=2)
    ranked = sorted({row["cache"]: row["kld"] for row in tuning.rows}.items(), key=lambda item: item[1])
    finalists = [cache for cache, _ in ranked[:FINALISTS]]
    assert "k5v5@kivi" in finalists and "k2v2@kivi" not in finalists  # the worst is not among them
    assert str(tuning.plan) == "k5v5@kivi"
    assert {"windows": "2", "offset": "64", "kld": 0.1}.items() <= tuning.card["validation"].items()
    tuning = kvjax.tune(model, text, **asked, folder=tmp_path, validation=0)
    assert str(tuning.plan) == "k8v8@kivi" and "validation" not in tuning.card


def test_what_validates_is_neither_calibrated_on_nor_judged(model: Model, text: str, tmp_path: Path) -> None:
    cut, _ = judge.make_validation(model, text, 64, 2, 10, 3, tmp_path)  # type: ignore[misc]
    ids = model.tokenizer.encode(Path(text).read_text())
    np.testing.assert_array_equal(cut, ids[10 + 2 * 64 : 10 + 5 * 64].reshape(3, 64))
    later = ids[64:192]
    with pytest.raises(KvjaxError, match=r"judged windows share .* expected windows that are not seen"):
        kvjax.tune(model, ids[:128], candidates="k4v4", **PLACE, judged_on=later, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_text_too_short_to_validate(model: Model, text: str, tmp_path: Path) -> None:
    ids = model.tokenizer.encode(Path(text).read_text())[:100]
    with pytest.raises(KvjaxError, match=r"has 100 tokens; expected at least 128 \(offset 64 and 1 windows of 64\)"):
        kvjax.tune(model, ids, candidates="k4v4", **PLACE, folder=tmp_path)
    assert not list(tmp_path.iterdir())


# ---- bits


def test_real_bits_are_those_of_the_stated_context(model: Model, searching: Callable[..., Search]) -> None:
    asked: Row = {"candidates": "k8v8,k4v4,k2v2,k4v4@token", "budget_of": "real"}
    for context in (64, 4096):
        search = searching(**asked, budget=7.0 if context > 64 else 12.0, budget_context=context)
        for spec, plan in zip(search.candidates, search.uniform, strict=True):
            assert search.bits.of(spec) == pytest.approx(plan.bits_real(context))
            assert search.bits.of_plan(plan) == plan.bits_real(context)
        assert str(search.bits) == f"real bits of {context} tokens"
        best = search.knapsack_front(search.candidates)
        chosen = next(filter(search.bits.fits, best))
        wider = [plan for plan in best if plan.bits_real(context) > chosen.bits_real(context)]
        assert all(plan.bits_real(context) > search.bits.budget for plan in wider)
    with pytest.raises(KvjaxError, match=r"budget=2\.0 real bits of 64 tokens; expected at least"):
        searching(**asked, budget=2.0, budget_context=64)
