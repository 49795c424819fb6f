"""Agreement at its edges; GSM8K's prompts, answers and files; accuracy against a direct comparison of texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.evaluate import tasks
from kvjax.evaluate.tasks import Accuracy, Agreement, Problem, accuracy, agreement, extract, few_shot, load_gsm8k
from kvjax.models.model import Model

SHOTS = [Problem("How much is 1+1?", "It is 1+1=<<1+1=2>>2.\n#### 2")]


# ---- agreement


@pytest.mark.parametrize(
    "dense,made,expected",
    [
        ([[5, 6, 7]], [[5, 6, 7]], Agreement(1, 1.0)),
        ([[5, 6, 7, 8]], [[5, 6, 9, 8]], Agreement(0, 0.5)),
        ([[5, 6]], [[9, 6]], Agreement(0, 0.0)),
        ([[5, 6, 7, 8]], [[5]], Agreement(0, 0.25)),
        ([[5, 6]], [[5, 6, 7, 8]], Agreement(0, 1.0)),  # goes on where the dense text ended
        ([[]], [[]], Agreement(1, 1.0)),
        ([[]], [[5]], Agreement(0, 0.0)),
        ([[5]], [[]], Agreement(0, 0.0)),
        ([[5, 6], [7, 8], [], [1]], [[5, 6], [7, 9], [], [2]], Agreement(2, 0.625)),
        (np.array([[5, 6], [7, 8]]), np.array([[5, 6], [7, 9]]), Agreement(1, 0.75)),
    ],
)
def test_agreement(dense: list[list[int]], made: list[list[int]], expected: Agreement) -> None:
    assert agreement(dense, made) == expected
    assert json.dumps(dataclasses.asdict(agreement(dense, made)))  # goes into rows of results


@pytest.mark.parametrize("dense,made", [([], []), ([[1]], []), ([[1]], [[1], [2]])])
def test_agreement_needs_pairs(dense: list[list[int]], made: list[list[int]]) -> None:
    with pytest.raises(kvjax.KvjaxError, match=f"{len(made)} texts and {len(dense)} dense ones; expected as many"):
        agreement(dense, made)


# ---- GSM8K


@pytest.mark.parametrize(
    "text,number",
    [
        (" She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("7", "7"),
        ("first 3, then 4", "4"),
        ("It cost $1,250,000", "1250000"),
        ("It cost $1,250.50 in all", "1250.50"),
        ("The answer is 42.", "42"),
        ("The answer is 5.", "5"),
        ("-12 degrees", "-12"),
        ("-5", "-5"),
        ("a loss of -$40.", "-40"),
        ("3-5", "-5"),
        (".5 of them", ".5"),
        ("50%", "50"),
        ("at 12:30", "30"),
        # What lm-eval makes of these is no number that is right:
        ("18...", "18.."),
        ("18 and so on ...", ".."),
        ("18 in $, she said", ""),
        ("", None),
        ("no number here. None at all, a $ at most", None),
        ("２３", None),  # not ASCII
    ],
)
def test_the_last_number_is_the_answer(text: str, number: str | None) -> None:
    assert extract(text) == number


@pytest.mark.parametrize("stop", ["Question:", "</s>", "<|im_end|>"])
def test_nothing_counts_after_a_stop_string(stop: str) -> None:
    assert extract(f" It is 18.\n\n{stop} How much is 3 + 4?\nAnswer: 7") == "18"
    assert extract(f"{stop} 7") is None
    assert extract(f" 1 {stop} 2 </s> 3 Question: 4 <|im_end|> 5") == "1"
    assert extract(f" 18 {stop[:-1]} 7") == "7"


def test_the_prompt_is_lm_evals() -> None:
    """Its doc_to_text, target delimiter (a space) and fewshot delimiter (an empty line)."""
    two = [*SHOTS, Problem("Two?", "#### 3")]
    assert few_shot(Problem("What?", "#### 1"), two) == (
        "Question: How much is 1+1?\nAnswer: It is 1+1=<<1+1=2>>2.\n#### 2\n\n"
        "Question: Two?\nAnswer: #### 3\n\n"
        "Question: What?\nAnswer:"
    )
    assert few_shot(Problem("What?", "#### 1"), []) == "Question: What?\nAnswer:"


@pytest.mark.parametrize(
    "answer,gold",
    [
        ("2 + 3 = <<2+3=5>>5\n#### 5", "5"),
        ("#### 1,250", "1250"),
        ("#### $2.50", "2.50"),
        ("#### -3.", "-3"),
        ("#### 1\n#### 2", "2"),
        ("#### 18\n", "18"),
    ],
)
def test_gold_answers(answer: str, gold: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [{"question": "Wie viele Äpfel?", "answer": answer}, {"question": "\u2019", "answer": "#### 7", "id": 3}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    problems = load_gsm8k(file)
    assert problems == [Problem("Wie viele Äpfel?", answer), Problem("\u2019", "#### 7")]
    assert [problem.gold for problem in problems] == [gold, "7"]
    assert extract(answer) == gold  # a problem's own answer is right


TEXTS = "expected a JSON object with the texts question and answer"
NO_NUMBER = "expected '#### ' and a number"


@pytest.mark.parametrize(
    "line,said",
    [
        (b'{"question": "a", "answer": "#### 1"', TEXTS),
        (b"", TEXTS),
        (b"[1, 2]", TEXTS),
        (b'"question answer"', TEXTS),
        (b"NaN", TEXTS),
        (b'{"question": "a"}', TEXTS),
        (b'{"answer": "#### 1"}', TEXTS),
        (b'{"question": NaN, "answer": "#### 1"}', TEXTS),
        (b'{"question": "a", "answer": NaN}', TEXTS),
        (b'{"question": 1, "answer": 2}', TEXTS),
        (b'{"question": ["a"], "answer": ["#### 1"]}', TEXTS),
        (b'{"question": null, "answer": "#### 1"}', TEXTS),
        (b'{"question": "half a \\ud83d", "answer": "#### 1"}', TEXTS),
        (b"[" * 100_000, TEXTS),
        (b'{"question": "\xff", "answer": "#### 1"}', "is not UTF-8: byte 14 does not decode"),
        (b'{"question": " ", "answer": "#### 1"}', "the question is empty; expected text"),
        (b'{"question": "a", "answer": "It is 12"}', f"the answer ends in 'It is 12'; {NO_NUMBER}"),
        (b'{"question": "a", "answer": "12"}', NO_NUMBER),
        (b'{"question": "a", "answer": "#### many"}', NO_NUMBER),
        (b'{"question": "a", "answer": "#### "}', NO_NUMBER),
        (b'{"question": "a", "answer": "#### $"}', NO_NUMBER),
        (b'{"question": "a", "answer": "#### NaN"}', NO_NUMBER),
        (b'{"question": "a", "answer": "####1"}', NO_NUMBER),
        (b'{"question": "a", "answer": ""}', NO_NUMBER),
    ],
)
def test_bad_lines_are_named(line: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    good = b'{"question": "a", "answer": "#### 1"}\n'
    file.write_bytes(good + line + b"\n" + good)
    with pytest.raises(kvjax.KvjaxError) as error:
        load_gsm8k(file)
    assert f"{file}, line 2" in str(error.value) and said in str(error.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, said in (("empty.jsonl", "is empty"), ("none.jsonl", "No such file"), (".", "Is a directory")):
        with pytest.raises(kvjax.KvjaxError, match=f"{tmp_path / name} .*{said}"):
            load_gsm8k(tmp_path / name)


# ---- accuracy


def test_accuracy_counts_what_generate_says(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" It is $1,018.\n\nQuestion: 5", " 2", " 3. Or 4", " none", " 5"]
    asked: list[list[str]] = []

    def generate(model: Model, prompts: list[str], plan: str, **options: object) -> SimpleNamespace:
        assert (model, plan, options) == (tiny, "k4v4", {"max_new_tokens": 9, "chat": False})
        asked.append(prompts)
        before = sum(map(len, asked[:-1]))
        return SimpleNamespace(texts=texts[before : before + len(prompts)])

    monkeypatch.setattr(tasks, "generate", generate)
    problems = [Problem(f"q{i}", f"#### {gold}") for i, gold in enumerate(("1,018", "2", "3", "0", "6"))]
    found = accuracy(tiny, "k4v4", problems, SHOTS, max_new_tokens=9, batch=2)
    assert found == Accuracy(correct=2, problems=5) and found.share == 0.4
    assert [len(prompts) for prompts in asked] == [2, 2, 1]
    assert [prompt for prompts in asked for prompt in prompts] == [few_shot(problem, SHOTS) for problem in problems]


@pytest.fixture(scope="module")
def tiny(goldens: Path) -> Model:
    """A random model that says digits only, and one whose template would lose the prompt."""
    model = kvjax.load(str(goldens / "llama-linear"), "float32")
    digits = model.tokenizer.encode("0123456789")
    head = jnp.zeros_like(model.params["head"]).at[digits].set(model.params["head"][digits])
    tokenizer = dataclasses.replace(model.tokenizer, chat_template="nothing")
    return dataclasses.replace(model, params=model.params | {"head": head}, tokenizer=tokenizer)


def test_accuracy_is_agreement_where_dense_texts_are_gold(tiny: Model) -> None:
    """Six prompts of several lengths, answered with numbers of two digits."""
    questions = ("two cows and a hen?", "How many eggs?", "7 * 6", "What is left of 80?", "A robe?", "3 men, 2 boats")
    prompts = [few_shot(Problem(question, ""), SHOTS) for question in questions]
    dense, small = (
        kvjax.generate(tiny, prompts, cache, max_new_tokens=2, chat=False).texts for cache in ("dense", "k1v1@token")
    )
    assert all(text.isdigit() and len(text) == 2 for text in dense + small)
    problems = [Problem(q, f"Well.\n#### {text}") for q, text in zip(questions, dense, strict=True)]
    same = sum(a == b for a, b in zip(dense, small, strict=True))
    assert 0 < same < 6
    options = {"max_new_tokens": 2, "batch": 6}
    assert accuracy(tiny, "dense", problems, SHOTS, **options) == Accuracy(6, 6)
    assert accuracy(tiny, "k1v1@token", problems, SHOTS, **options) == Accuracy(same, 6)


@pytest.mark.parametrize(
    "problems,options,said",
    [
        ([], {}, "0 problems in batches of 8"),
        (SHOTS, {"batch": 0}, "1 problems in batches of 0"),
        ([Problem("a" * 300, "#### 1")], {"max_new_tokens": 2}, "the model's 256 tokens"),
        (SHOTS, {}, "and 256 new ones; expected at most the model's 256 tokens"),
        (SHOTS, {"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_bad_input_is_said(tiny: Model, problems: list[Problem], options: dict[str, int], said: str) -> None:
    with pytest.raises(kvjax.KvjaxError, match=said):
        accuracy(tiny, "dense", problems, SHOTS, **options)
