"""The comparison of searches: equal evaluations, seeds, an unseen text, kills, and what is said of the rows."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_collections import config_dict

import kvjax
from kvjax import records
from kvjax.caches.plan import CachePlan
from kvjax.configs.searches import get_config
from kvjax.errors import KvjaxError
from kvjax.experiments import searches, style
from kvjax.experiments.searches import SEARCHES, course, draw, spread, summary
from kvjax.tuner import judge, search
from kvjax.tuner.layer_errors import LayerErrors
from kvjax.tuner.search import Search

Row = dict[str, Any]
TRIALS, SENSITIVITY, SEEDS = 12, 2.3, 2
CALIBRATED, JUDGED = "the quick brown fox jumps over the lazy dog. ", "Pack my box with five dozen liquor jugs! "


def cost(plan: CachePlan, of_keys: float) -> float:
    """An invented KL: a layer's is that of its keys' and its values' bits."""
    return sum((of_keys * 4.0**-s.key_bits + 4.0**-s.value_bits) / (i + 1) for i, s in enumerate(plan.specs))


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that cost nothing: what counts here is the bookkeeping."""

    def evaluate(self: Search, plan: CachePlan) -> Row:
        return {"kld": cost(plan, 3), "nll": 1.0, "top1": 0.5, "seconds": 0.1}

    def measure(self: LayerErrors, layer: int, places: list, *_: Any) -> list[Row]:
        specs = [place.spec for place in places]
        bits = [{"bits_nominal": spec.bits_nominal, "bits_asymptotic": spec.bits_nominal} for spec in specs]
        k, v = (np.array([4.0 ** -getattr(spec, f"{name}_bits") for spec in specs]) for name in ("key", "value"))
        errors = [{"e_o": x + 2 * y, "predicted": 3 * x + y, "joint": 3 * x + y} for x, y in zip(k, v, strict=True)]
        named = [{"layer": layer, "cache": str(spec)} for spec in specs]
        return [one | two | three for one, two, three in zip(named, bits, errors, strict=True)]

    class Unseen:
        def __init__(self, model: Any, windows: Any):
            pass

        def score(self, plan: CachePlan) -> CachePlan:
            return plan

    class Judged:
        @staticmethod
        def of(plan: CachePlan, windows: Any) -> Any:
            kld = cost(plan, 30)
            return SimpleNamespace(
                kld=kld, kld_se=0.0, nll=1.0, top1=0.5, per_token=SimpleNamespace(kld=np.full((1, 1), kld))
            )

    monkeypatch.setattr(Search, "_evaluate", evaluate)
    monkeypatch.setattr(LayerErrors, "_measure", measure)
    monkeypatch.setattr(LayerErrors, "_gradients", lambda self: [0])
    monkeypatch.setattr(LayerErrors, "_carries", lambda self, plan, places: [{}] * len(places))
    monkeypatch.setattr(search, "Simulator", lambda *_: None)
    monkeypatch.setattr(judge, "Simulator", Unseen)
    monkeypatch.setattr(judge, "Score", Judged)
    monkeypatch.setattr(style, "write", lambda *_: None)


@pytest.fixture
def config(goldens: Path, tmp_path: Path) -> config_dict.ConfigDict:
    texts = {"text": CALIBRATED, "judged_on": JUDGED}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(20 * text)
    config = get_config()
    config.update({name: str(tmp_path / f"{name}.txt") for name in texts})
    config.update(model=str(goldens / "llama-llama3"), context=64, judged_windows=1, trials=TRIALS, seeds=SEEDS)
    return config


def run(config: config_dict.ConfigDict, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setattr(searches, "_sensitivity", lambda *_: SENSITIVITY)
    workdir.mkdir(exist_ok=True)
    searches.main(config, workdir)
    return records.read_rows(workdir / "searches.jsonl")


def test_a_row_per_search_and_seed_of_equal_evaluations(
    config: config_dict.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(config, tmp_path / "out", monkeypatch)
    assert [(row["seed"], row["search"]) for row in rows] == [(i, name) for i in range(SEEDS) for name in SEARCHES]
    for row in rows:
        assert row["sensitivity"] == (0 if row["search"] == "NSGA-II" else SENSITIVITY)
        assert 1 < len(row["evaluated"]) + row["sensitivity"] <= TRIALS
    free = [row for row in rows if row["search"] == "NSGA-II"]
    assert free[0]["evaluated"] != free[1]["evaluated"]  # another seed is another search
    assert len(free[0]["evaluated"]) > TRIALS - SENSITIVITY


def test_choices_are_made_on_the_calibrated_text_and_judged_on_the_other(
    config: config_dict.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kvjax.load(config.model, config.dtype)
    for row in run(config, tmp_path / "out", monkeypatch):
        assert (row["text"], row["judged_on"]) == ("text.txt", "judged_on.txt")
        assert row["judged_tokens_sha256"] != row["tokens_sha256"]
        budgets = [b for b in (3, 4, 5, 6) if any(bits <= b for bits, _ in row["evaluated"])]
        assert [each["budget"] for each in row["judged"]] == budgets
        for each in row["judged"]:
            plan = CachePlan.parse(each["cache"], model.config)
            assert plan.bits_nominal == each["bits"] <= each["budget"]
            assert each["kld_calibrated"] == min(kld for bits, kld in row["evaluated"] if bits <= each["budget"])
            assert each["kld_calibrated"] == cost(plan, 3) and each["kld"] == cost(plan, 30)


def test_goes_on_where_it_was_killed(
    config: config_dict.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config, tmp_path / "whole", monkeypatch)
    made, evaluate = [], Search._evaluate

    def killed(self: Search, plan: CachePlan) -> Row:
        made.append(plan)
        if len(made) == 30:
            raise KeyboardInterrupt
        return evaluate(self, plan)

    monkeypatch.setattr(Search, "_evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "out", monkeypatch)
    before = records.read_rows(tmp_path / "out/searches.jsonl")
    assert 0 < len(before) < len(whole)
    assert run(config, tmp_path / "out", monkeypatch) == whole
    count = len(made)
    assert run(config, tmp_path / "out", monkeypatch) == whole and len(made) == count
    config.seeds = SEEDS + 1
    assert run(config, tmp_path / "out", monkeypatch)[: len(whole)] == whole


def test_the_cost_of_sensitivity_is_timed_once(
    config: config_dict.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kvjax.load(config.model, config.dtype)
    first = searches.make_search(config, model, searches.calibration(config, model), tmp_path)
    seconds = iter((10.0, 10.5))
    monkeypatch.setattr(searches.time, "perf_counter", lambda: next(seconds))
    costs = [searches._sensitivity(first, tmp_path / "costs.jsonl") for _ in range(2)]
    assert costs == [pytest.approx(5.0)] * 2  # half a second, and a tenth an evaluation


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("judged_budgets", "3,7", "judged_budgets=3,7; expected bits of at most the budget, 6"),
        ("judged_budgets", "3,many", "judged_budgets='3,many'; expected numbers of bits"),
        ("seeds", 0, "seeds=0; expected at least 1"),
    ],
)
def test_what_is_refused(name: str, value: Any, said: str, config: config_dict.ConfigDict, tmp_path: Path) -> None:
    config[name] = value
    with pytest.raises(KvjaxError, match=said):
        searches.main(config, tmp_path)


def test_a_text_that_was_calibrated_on_judges_nothing(config: config_dict.ConfigDict, tmp_path: Path) -> None:
    config.judged_on = config.text
    with pytest.raises(KvjaxError, match=r"text\.txt is both calibrated on and judged on; expected another text"):
        searches.main(config, tmp_path)


# ---- what is said of the rows


def row_of(name: str, seed: int, evaluated: list, judged: list[float]) -> Row:
    choices = [{"budget": budget, "kld": kld} for budget, kld in zip((3.0, 6.0), judged, strict=False)]
    about = {
        "model": "tiny",
        "text": "a.txt",
        "judged_on": "b.txt",
        "windows": 1,
        "context": 64,
        "budget_of": "nominal",
    }
    cost = {"sensitivity": 0.0 if name == "NSGA-II" else 4.5, "reference": [6.0, 1.0]}
    return about | {"search": name, "seed": seed, "evaluated": evaluated, "judged": choices} | cost


KNAPSACK = "knapsack, predicted KL"
ROWS = [
    row_of("NSGA-II", 0, [[5, 0.1], [4, 0.1], [7, 1e-3]], [0.5, 0.03]),
    row_of("NSGA-II", 1, [[4, 0.1], [5, 0.01]], [0.4, 0.01]),
    row_of("NSGA-II", 2, [[5, 0.1]], [0.9]),
    *(row_of(KNAPSACK, seed, [[5, 0.1], [5, 1e-4]], [0.2, 0.01]) for seed in range(3)),
]


def test_hypervolume_after_every_evaluation() -> None:
    """Of bits below 6 and of powers of ten below 1; what is beyond the budget adds nothing."""
    assert course(ROWS[0]) == pytest.approx([1, 2, 2])
    assert course(ROWS[1]) == pytest.approx([2, 3])
    noise = row_of("NSGA-II", 0, [[5, -1e-9]], [])
    assert course(noise) == pytest.approx([-math.log10(searches.NOISE)])


def test_medians_and_ranges_over_the_seeds() -> None:
    header, lines = summary(ROWS)
    assert header[-2:] == ["unseen KL at 3 bits", "unseen KL at 6 bits"]
    (*nsga, low, high), knapsack = lines
    assert nsga == ["NSGA-II", "3", "2 (1 to 3)", "0.0", "2.00 (1.00 to 3.00)", "never"]  # its best is one seed's
    assert (low, high) == ("0.5000 (0.4000 to 0.9000)", "0.0200 (0.0100 to 0.0300)")
    assert knapsack == [KNAPSACK, "3", "2", "4.5", "4.00", "2", "0.2000", "0.0100"]
    assert spread([], ".2f") == "none"


def test_the_picture_has_medians_and_ranges() -> None:
    figure = draw(ROWS)
    courses, judged = figure.axes
    nsga, knapsack = (line.get_xydata().tolist() for line in courses.lines)
    assert nsga == [[1, 1], [2, 2], [3, 2]]  # of 1, 2, 2 and 2, 3, 3 and 1, 1, 1
    assert knapsack == [[5.5, 1], [6.5, 4]]
    assert len(courses.collections) == 2
    lines = [bars.lines[0].get_xydata().tolist() for bars in judged.containers]
    assert lines == [[[3, 0.5], [6, pytest.approx(0.02)]], [[3, 0.2], [6, 0.01]]]
    (bars,) = judged.containers[0].lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([0.4, 0.9]),
        pytest.approx([0.01, 0.03]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["NSGA-II", KNAPSACK]
