"""What a small cache does to generated text: agreement with the dense text, and answers to GSM8K's problems.

GSM8K is scored as by lm-eval's `gsm8k`, whose flexible-extract is `extract` and whose strict-match `extract_stated`.
The shots are those given, where lm-eval draws its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.generation.generate import generate
from kvjax.models.model import Model

# lm-eval's. IGNORED is taken out of numbers and gold answers, one after the other.
NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
STATED = re.compile(r"#### (-?[0-9.,]+)")
STOPS = re.compile(r"Question:|</s>|<\|im_end\|>")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of greedy texts with the dense ones.

    Attributes:
      whole: texts that are the same.
      share: of a dense text's tokens, those before the first difference; the mean over texts.
    """

    whole: int
    share: float


def agreement(dense: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> Agreement:
    """Compares token ids, text by text. The share of a dense text without tokens is 1 where both have none, else 0.

    Raises:
      KvjaxError: there are no texts, or not as many of both.
    """
    if not len(dense) or len(dense) != len(made):
        raise KvjaxError(f"{len(made)} texts and {len(dense)} dense ones; expected as many, and at least one")
    pairs = list(zip(dense, made, strict=True))
    whole = sum(common_prefix(a, b) == len(a) == len(b) for a, b in pairs)
    return Agreement(whole, sum(_share(a, b) for a, b in pairs) / len(pairs))


def _share(dense: Sequence[int], made: Sequence[int]) -> float:
    return common_prefix(dense, made) / len(dense) if len(dense) else float(not len(made))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens until the two differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of GSM8K; its answer ends in `#### ` and a number."""

    question: str
    answer: str

    @property
    def gold(self) -> str:
        """The number, as `extract` writes it."""
        return _plain(self.answer).strip()


def load_gsm8k(path: str | Path) -> list[Problem]:
    """The problems of a GSM8K file: each line a JSON object with `question` and `answer`.

    Raises:
      KvjaxError: it cannot be read or is empty, or a line is no such problem.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise KvjaxError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise KvjaxError(f"{path} is empty; expected problems of GSM8K, one a line")
    return [_problem(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _problem(line: bytes, where: str) -> Problem:
    try:
        row = json.loads(line.decode())
        problem = Problem(row["question"], row["answer"])
        (problem.question + problem.answer).encode()  # JSON may hold half a character
    except UnicodeDecodeError as error:
        raise KvjaxError(f"{where} is not UTF-8: byte {error.start} does not decode") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise KvjaxError(f"{where}: expected a JSON object with the texts question and answer") from None
    if not problem.question.strip():
        raise KvjaxError(f"{where}: the question is empty; expected text")
    if "#### " not in problem.answer or not re.fullmatch(r"-?[0-9]*\.?[0-9]+", problem.gold):
        raise KvjaxError(f"{where}: the answer ends in {problem.answer[-20:]!r}; expected '#### ' and a number")
    return problem


def few_shot(problem: Problem, shots: Sequence[Problem]) -> str:
    """The prompt: the shots with their answers, then the problem's question."""
    solved = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{solved}Question: {problem.question}\nAnswer:"


def extract(text: str) -> str | None:
    """The last number in a text before the first stop string, without `,`, `$` and a `.` at its end."""
    numbers = [match[0] for match in NUMBER.finditer(STOPS.split(text, maxsplit=1)[0])]
    return _plain(numbers[-1]) if numbers else None


def extract_stated(text: str) -> str | None:
    """The first number behind `#### `, in the form of `extract`."""
    match = STATED.search(STOPS.split(text, maxsplit=1)[0])
    return _plain(match[1]) if match else None


def _plain(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How many problems were answered with their gold number."""

    correct: int
    problems: int

    @property
    def share(self) -> float:
        return self.correct / self.problems


def accuracy(
    model: Model,
    plan: str | CachePlan,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    *,
    max_new_tokens: int = 256,
    batch: int = 8,
) -> Accuracy:
    """Answers the problems greedily, `batch` of them at a time, without a chat template.

    Args:
      model: what `kvjax.load` gives.
      plan: as `cache` of `kvjax.generate`.
      problems: what is asked.
      shots: what every prompt shows before its question; none is fine.
      max_new_tokens: of each answer, at most.
      batch: problems that are answered together.

    Raises:
      KvjaxError: no problems, a prompt longer than the model reads, or whatever else `generate` refuses.
    """
    if not problems or batch < 1:
        raise KvjaxError(f"{len(problems)} problems in batches of {batch}; expected at least 1 and 1")
    correct = 0
    for start in range(0, len(problems), batch):
        some = problems[start : start + batch]
        prompts = [few_shot(problem, shots) for problem in some]
        texts = generate(model, prompts, plan, max_new_tokens=max_new_tokens, chat=False).texts
        correct += sum(extract(text) == problem.gold for text, problem in zip(texts, some, strict=True))
    return Accuracy(correct, len(problems))
