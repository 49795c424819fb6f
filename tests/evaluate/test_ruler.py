"""What RULER's forms ask: that samples hold what they ask for, fit their context, and follow their seed."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest

import kvjax
from kvjax.evaluate import ruler, suite
from kvjax.evaluate.answers import Answers
from kvjax.evaluate.ruler import ROOM, Needle, Sample, Tracking, fitted, marks
from kvjax.models.model import Model


@pytest.fixture(scope="module")
def model(goldens: Path) -> Model:
    """A tokenizer of single characters, and room for some."""
    made = kvjax.load(str(goldens / "llama-linear"), "float32")
    return dataclasses.replace(made, config=dataclasses.replace(made.config, max_positions=2048))


CHARACTERS = lambda question, answer: list(question + answer)  # noqa: E731


@pytest.mark.parametrize("haystack", ["noise", "needles"])
def test_the_number_of_the_key_lies_in_the_text(haystack: str) -> None:
    task = Needle(context=3000, keys=3, haystack=haystack, samples=5, seed=4)
    for sample in fitted(task, CHARACTERS, task.make, 10_000):
        said = re.findall(r"magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", sample.question)
        numbers = dict(said)
        assert len(numbers) == len(said) and (len(said) > 20 if haystack == "needles" else len(said) == 3)
        key = re.search(r"number for (\S+) mentioned", sample.answer)[1]
        assert sample.wanted == [numbers[key]] and sample.question.count(key) == 2
        assert 3000 - 90 < len(sample.question + sample.answer) + ROOM <= 3000


def test_chains_can_be_followed() -> None:
    task = Tracking(context=4000, chains=3, hops=4, samples=4)
    for sample in fitted(task, CHARACTERS, task.make, 4000):
        example, asked = sample.question.split("\n\nMemorize")
        for text, wanted in ((example, None), (asked, sample.wanted)):
            values: dict[str, str] = {}
            for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text):
                values[name] = values.get(source, source)  # sources stand before what is made from them
            assert len(values) == 15 and len(set(values.values())) == 3
            number = re.search(r"assigned the value (\d+) in", text)[1]
            names = [name for name, value in values.items() if value == number]
            assert len(names) == 5 and set(names) == set(wanted or re.findall(r"[A-Z]{5}", text.split("are:")[1]))
        assert len(sample.question + sample.answer) + ROOM <= 4000


def test_samples_follow_the_seed_and_needles_the_depth() -> None:
    one, same, other = (Needle(samples=6, seed=seed) for seed in (0, 0, 1))
    made = [fitted(task, CHARACTERS, task.make, 1024) for task in (one, same, other)]
    assert made[0] == made[1] and not set(map(str, made[0])) & set(map(str, made[2]))
    depths = [sample.question.index(sample.wanted[0]) for sample in made[0]]
    assert max(depths) - min(depths) > 300
    longer = one.make(random.Random("x"), 50), one.make(random.Random("x"), 10)
    assert longer[0].wanted == longer[1].wanted and len(longer[0].question) > len(longer[1].question)


def test_essays_are_cut_into_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "load_text", lambda name: "One. Two!\nThree? Four\n\n")
    ruler._essays.cache_clear()
    try:
        question = Needle(haystack="essays", keys=1).make(random.Random(0), 6).question
    finally:
        ruler._essays.cache_clear()
    kept = re.sub(r"One of the special .*? is: \d+\. ?", "", question.split("\n")[1])
    assert kept.strip() == "One. Two! Three? Four One. Two!"


def test_marks_are_shares_whatever_the_case() -> None:
    samples = [Sample("", "", ["AB", "cd"]), Sample("", "", ["7"]), Sample("", "", ["x", "y"])]
    assert marks(["..ab..", "1 7 1", "XY"], samples) == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "name,said",
    [
        ("needle(context=2900)", "context=2900; expected at most the model's 2048"),
        ("needle(context=100)", r"context=100; expected at least \d+"),
        ("needle(keys=0)", "keys=0; expected 1 to"),
        ("needle(samples=0)", "samples=0; expected 1 to 1000"),
        ("needle(haystack=hay)", "haystack=hay; expected noise, essays or needles"),
        ("tracking(chains=0)", "chains=0; expected 1 to 1000"),
        ("tracking(hops=1000)", "chains times hops"),
        ("needle(depth=2)", "no field 'depth'"),
    ],
)
def test_bad_settings_are_said(model: Model, name: str, said: str) -> None:
    with pytest.raises(kvjax.KvjaxError, match=said):
        suite.parse_task(name).figures(Answers(model))


@pytest.mark.parametrize("task", [Needle(context=1500, keys=2, samples=4), Tracking(context=1500, samples=4)])
def test_figures_are_the_mean_of_marks(task: Any, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that repeats all it read finds everything, one that says nothing finds nothing."""
    for say, expected in ((model.tokenizer.decode, 1.0), (lambda ids: "", 0.0)):
        monkeypatch.setattr(Answers, "texts", lambda self, prompts, writing, say=say: [say(ids) for ids in prompts])
        (figure,) = task.figures(Answers(model))
        assert (figure.value, figure.stderr, figure.samples, figure.metric) == (expected, 0.0, 4, "found")
        assert figure.task == str(task) and suite.parse_task(str(task)) == task
