"""Names of tasks, and rows of tasks over plans, which are made once."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import kvjax
from kvjax.evaluate import suite
from kvjax.evaluate.answers import Answers
from kvjax.evaluate.ruler import Needle, Tracking
from kvjax.evaluate.task import Figure, Task
from kvjax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Letters(Task):
    """Asks for a log-likelihood, and counts how often it is asked itself."""

    form: ClassVar[str] = "letters"
    asked: ClassVar[list[str]] = []
    size: int = 2

    def figures(self, answers: Answers) -> list[Figure]:
        self.asked.append(str(answers.plan))
        values = [value for value, _ in answers.loglikelihoods([([5], [7 + i]) for i in range(self.size)])]
        return [Figure.of(str(self), "loglikelihood", np.array([values])), Figure("part", "other", 1.0, math.nan, 3)]


@pytest.fixture(scope="module")
def model(goldens: Path) -> Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")


def test_names_of_tasks() -> None:
    needle, tracking = suite.parse_tasks("needle(context=2048,haystack=needles), tracking,tracking()")
    assert needle == Needle(context=2048, haystack="needles") and tracking == Tracking()
    assert str(needle) == "needle(context=2048,haystack=needles)"
    assert suite.parse_tasks([needle, "tracking"]) == [needle, tracking]


@pytest.mark.parametrize(
    "names,said",
    [
        ("needle,,tracking", "list of tasks 'needle,,tracking': expected names separated by single commas"),
        ("needle(context)", "field 'context'; expected field=value"),
        ("needle(context=many)", "context=many; expected a whole number"),
        ("needle(context=512", "task 'needle"),
    ],
)
def test_bad_names_are_said(names: str, said: str) -> None:
    with pytest.raises(kvjax.KvjaxError, match=said.replace("(", r"\(")):
        suite.parse_tasks(names)


def test_tasks_of_the_harness_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "kvjax.evaluate.lm_eval", raising=False)
    with pytest.raises(kvjax.KvjaxError, match=r"needs lm-eval; expected: pip install 'kvjax\[eval\]'"):
        suite.parse_tasks("arc_easy")


def test_rows_are_made_once(model: Model, tmp_path: Path) -> None:
    heard: list[Any] = []
    tasks, plans = [Letters(), Letters(3)], ["dense", "k2v2@token", "dense"]
    rows = suite.evaluate(model, tasks, plans, folder=tmp_path, batch=2, progress=lambda *each: heard.append(each))
    assert Letters.asked == ["dense", "dense", "k2v2@token", "k2v2@token"]
    assert [(row["cache"], row["task"], row["metric"]) for row in rows[:4]] == [
        ("dense", "letters", "loglikelihood"),
        ("dense", "letters", "other"),
        ("dense", "letters(size=3)", "loglikelihood"),
        ("dense", "letters(size=3)", "other"),
    ]
    assert len(rows) == 8 and rows[0]["value"] == pytest.approx(rows[4]["value"], abs=1) and rows[1]["part"] == "part"
    assert rows[0]["samples"] == 2 and math.isnan(rows[1]["stderr"]) and rows[0]["stderr"] > 0
    assert {"model_sha256", "git", "versions", "bits_asymptotic", "chat", "prefill_chunk"} <= set(rows[0])
    assert (Letters(), kvjax.plan(model, "dense"), 1, 1) in heard
    kept = (tmp_path / "evaluate.jsonl").read_bytes()
    again = suite.evaluate(model, tasks, plans, folder=tmp_path)
    assert [row["value"] for row in again] == [row["value"] for row in rows] and len(Letters.asked) == 4
    assert (tmp_path / "evaluate.jsonl").read_bytes() == kept

    # Rows that are lost are made again from the answers that are kept, to the last digit.
    lines = kept.splitlines(keepends=True)
    (tmp_path / "evaluate.jsonl").write_bytes(b"".join(lines[:6]))
    suite.evaluate(model, tasks, plans, folder=tmp_path)
    remade = [json.loads(line) for line in (tmp_path / "evaluate.jsonl").read_bytes().splitlines()]
    assert [row["value"] for row in remade] == [row["value"] for row in rows] and len(Letters.asked) == 5


def test_figures_of_seeds() -> None:
    figure = Figure.of("t", "m", np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert figure.value == 0.5 and figure.by_seed == pytest.approx((2 / 3, 1 / 3)) and figure.samples == 3
    assert figure.stderr == pytest.approx(0.5 / 3**0.5)  # the samples' means are 1, 0 and 0.5
    assert math.isnan(Figure.of("t", "m", np.array([[1.0]])).stderr)
