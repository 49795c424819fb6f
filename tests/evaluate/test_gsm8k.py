"""GSM8K as a task: shots of seeds, both readings of an answer, invalid answers apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvjax
from kvjax.evaluate import suite
from kvjax.evaluate.answers import Answers, Writing
from kvjax.evaluate.gsm8k import GSM8K, STOPS
from kvjax.evaluate.tasks import extract_stated
from kvjax.models.model import Model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "problems"
    folder.mkdir()
    for name, count in (("train", 6), ("test", 4)):
        rows = [{"question": f"{name} {i}?", "answer": f"Well.\n#### {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(goldens: Path) -> Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")


@pytest.mark.parametrize(
    "text,number",
    [
        (" 3 + 4 = 7\n#### 7", "7"),
        ("#### $7", None),
        ("#### 1,250.\nSo 3", "1250"),
        ("#### -3 #### 4", "-3"),
        ("It is 7.", None),
        ("7\n\nQuestion: #### 8", None),
        ("####7", None),
    ],
)
def test_the_stated_number(text: str, number: str | None) -> None:
    assert extract_stated(text) == number


def test_both_readings_by_seed_and_invalid_apart(data: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [" #### 0", " 1.", " 2 #### 5", " none", " #### 0", " #### 1", " none", " none"]
    asked: list[str] = []

    def texts(self: Answers, prompts: Any, writing: Writing) -> list[str]:
        assert writing == Writing(90, STOPS)
        asked.extend(self.model.tokenizer.decode(prompt) for prompt in prompts)
        return said

    monkeypatch.setattr(Answers, "texts", texts)
    task = suite.parse_task(f"gsm8k(data={data},shots=2,seeds=2,tokens=90)")
    found = {figure.metric: figure for figure in task.figures(Answers(model))}
    assert {name: figure.value for name, figure in found.items()} == {
        "strict": 3 / 8,
        "invalid, strict": 4 / 8,
        "flexible": 4 / 8,
        "invalid, flexible": 3 / 8,
    }
    assert found["flexible"].by_seed == (0.5, 0.5) and found["strict"].by_seed == (0.25, 0.5)
    assert found["flexible"].samples == 4
    assert found["flexible"].stderr == pytest.approx((4 * 0.25 / 3) ** 0.5 / 2)  # the means are 1, 1, 0 and 0
    first, second = ({prompt.split("\n\nQuestion: test")[0] for prompt in half} for half in (asked[:4], asked[4:]))
    assert len(first) == len(second) == 1 and first != second  # other shots for each seed
    assert asked[1].endswith("Question: test 1?\nAnswer:") and asked[1].count("Question: train") == 2


def test_names_hold_no_path(data: Path) -> None:
    task = GSM8K(str(data), samples=3)
    assert str(task) == "gsm8k(data=problems,samples=3)"
    assert task.identity != GSM8K(str(data), samples=2).identity and len(task.problems) == 3


@pytest.mark.parametrize(
    "settings,said",
    [
        ("shots=7", "train.jsonl has 6 problems; expected 7"),
        ("samples=9", "test.jsonl has 4 problems; expected 9"),
        ("seeds=0", "seeds=0; expected 1 to 100000"),
        ("shots=-1", "shots=-1; expected at least 0"),
    ],
)
def test_bad_settings_are_said(data: Path, settings: str, said: str) -> None:
    with pytest.raises(kvjax.KvjaxError, match=said):
        suite.parse_task(f"gsm8k(data={data},{settings})")


def test_data_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(kvjax.KvjaxError, match=f"{tmp_path}/none/train.jsonl cannot be read"):
        suite.parse_task(f"gsm8k(data={tmp_path}/none)")
