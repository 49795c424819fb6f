"""Log-likelihoods against logits and against scores, texts against `generate`, and what is kept of both."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax.evaluate import answers as module
from kvjax.evaluate.answers import Answers, Writing
from kvjax.models.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(goldens: Path) -> Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")


def encode(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text).tolist()


def reference(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the logits of one dense prefill."""
    read = [*context, *continuation][-257:-1]
    logits = np.asarray(kvjax.logits(model, read)[0], np.float64)[-len(continuation) :]
    values = np.asarray(jax.nn.log_softmax(logits, -1))[np.arange(len(continuation)), continuation]
    return float(values.sum()), bool((logits.argmax(-1) == continuation).all())


def test_dense_loglikelihoods_are_those_of_the_logits(model: Model) -> None:
    """Contexts of several lengths, one longer than the model; continuations that share what is read, one greedy."""
    shared = encode(model, "The answer is")
    best = [int(np.asarray(kvjax.logits(model, shared)[0, -1]).argmax())]
    pairs = [
        (shared, encode(model, " yes")),
        (shared, encode(model, " yet")),
        (shared, best),
        ([*shared, *encode(model, " y")], encode(model, "es")),
        ([7], [9]),
        (encode(model, "ab" * 200), encode(model, "abc")),
    ]
    told: list[tuple[int, int]] = []
    found = Answers(model, batch=2, progress=lambda *each: told.append(each)).loglikelihoods(pairs)
    assert told[-1] == (4, 4)  # three of the first four are read together
    expected = [reference(model, *pair) for pair in pairs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[2][1] and not all(greedy for _, greedy in found)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * 257)])
def test_pairs_that_cannot_be_scored_are_said(model: Model, pair: tuple[list[int], list[int]]) -> None:
    said = (
        f"a context of {len(pair[0])} tokens and a continuation of {len(pair[1])}; expected at least 1 and 1 to 256"
    )
    with pytest.raises(kvjax.KvjaxError, match=said):
        Answers(model).loglikelihoods([pair])


def test_texts_are_those_of_generate_without_special_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [encode(model, text) for text in ("hello", "good day to you")]
    found = Answers(model, "k4v4@token", batch=2).texts(prompts, Writing(12, ("e", "##")))
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_strings": ["e", "##"], "max_len": 32, "chat": False}
    made = kvjax.generate(model, prompts[::-1], "k4v4@token", **options)
    assert found == [re.sub("<unk>|</?s>", "", text) for text in made.texts[::-1]]

    asked: list[list[list[int]]] = []
    said = lambda model, prompts, *_, **options: asked.append(prompts) or SimpleNamespace(texts=["a<s>", "b"])  # noqa: E731
    monkeypatch.setattr(module, "generate", said)
    long = list(range(3, 103)) * 3
    assert Answers(model, batch=2).texts([long], Writing(12)) == ["a"]
    assert asked == [[long[-244:]] * 2]  # the beginning is left out, and one program serves every batch


def test_texts_need_room_for_their_prompt(model: Model) -> None:
    with pytest.raises(kvjax.KvjaxError, match="256 new tokens; expected fewer than the model's 256"):
        Answers(model).texts([[1]], Writing(256))


def test_the_same_prompt_is_drawn_again_with_another_seed(model: Model) -> None:
    prompts, writing = [encode(model, "once")] * 3, Writing(12, temperature=1.0)
    found = Answers(model, batch=2).texts(prompts, writing)
    assert len(set(found)) == 3
    assert Answers(model, batch=2).texts(prompts, writing) == found


def test_answers_are_kept_apart_for_each_plan(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut off after some batches asks only for the others, and gives the same."""
    pairs = [(encode(model, "a" * n), encode(model, "bc")) for n in (3, 9, 5, 7, 4)]
    whole = Answers(model, "k2v2@token", batch=2, folder=tmp_path / "whole").loglikelihoods(pairs)
    asked: list[int] = []
    score = Answers._score

    def counted(self: Answers, units: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(units))
        return score(self, units)

    monkeypatch.setattr(Answers, "_score", counted)
    cut = {"batch": 2, "folder": tmp_path / "cut"}
    with pytest.raises(KeyboardInterrupt):
        Answers(model, "k2v2@token", **cut).loglikelihoods(pairs)
    asked.clear()
    told: list[tuple[int, int]] = []
    again = Answers(model, "k2v2@token", **cut, progress=lambda *each: told.append(each)).loglikelihoods(pairs)
    assert again == whole and asked == [1] and told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    asked.clear()
    more = [*pairs, ([7], [9])]  # in other batches: what is kept is not given anew
    assert Answers(model, "k2v2@token", **cut | {"batch": 4}).loglikelihoods(more)[:5] == whole and asked == [2]
    asked.clear()
    assert Answers(model, "dense", **cut | {"batch": 5}).loglikelihoods(pairs) != whole and asked == [5]


def test_damaged_answers_are_named(model: Model, tmp_path: Path) -> None:
    Answers(model, batch=1, folder=tmp_path).loglikelihoods([([7], [9])])
    (file,) = tmp_path.glob("answers/*/*.json")
    file.write_text("{")
    with pytest.raises(kvjax.KvjaxError, match=f"{file} is not JSON"):
        Answers(model, batch=1, folder=tmp_path)


def test_sizes_are_few(model: Model) -> None:
    answers = Answers(model)
    sizes = {answers._size(tokens) for tokens in range(1, 257)}
    assert sizes == {32, 64, 128, 256} and answers._size(5000) == 256
    assert all(answers._size(tokens) >= tokens for tokens in range(1, 257)) and module.LEAST == 32
