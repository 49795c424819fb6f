"""GSM8K with a chain of thought: the problems and marks of lm-eval's `gsm8k`, shots drawn from seeds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvjax.caches import fields
from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.evaluate.answers import Answers, Writing
from kvjax.evaluate.task import Figure, Task
from kvjax.evaluate.tasks import Problem, extract, extract_stated, few_shot, load_gsm8k

STOPS = ("Question:", "</s>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class GSM8K(Task):
    """Problems that are solved in words behind solved ones.

    `strict` takes the number after `####`, `flexible` the last number of the text. An answer without one is wrong,
    and counted as `invalid` beside: a cache may lose the form before it loses the arithmetic.

    Attributes:
      data: a folder with GSM8K's train.jsonl, for the shots, and test.jsonl.
      samples: problems that are asked, the first ones; all where 0.
      shots: solved problems before each.
      seeds: how many times all is asked, each time behind other shots.
      tokens: of an answer, at most.
    """

    form: ClassVar[str] = "gsm8k"
    data: str = "gsm8k"
    samples: int = 0
    shots: int = 5
    seeds: int = 1
    tokens: int = 256

    def __post_init__(self) -> None:
        """Raises KvjaxError for settings that ask nothing, and for data that cannot be read."""
        fields.check(self)
        for name in ("seeds", "tokens"):
            check_whole(f"{self}: {name}", getattr(self, name), 1, 100_000)
        for name, needed in (("train", self.shots), ("test", self.samples)):
            if len(_load(self.data, name)) < needed:
                raise KvjaxError(
                    f"{self}: {name}.jsonl has {len(_load(self.data, name))} problems; expected {needed}"
                )

    @property
    def problems(self) -> list[Problem]:
        """What is asked."""
        return _load(self.data, "test")[: self.samples or None]

    def drawn(self, seed: int) -> list[Problem]:
        """The shots of a seed."""
        return random.Random(seed).sample(_load(self.data, "train"), self.shots)

    @property
    def identity(self) -> dict[str, Any]:
        asked = [*self.problems, *(shot for seed in range(self.seeds) for shot in self.drawn(seed))]
        text = json.dumps([[problem.question, problem.answer] for problem in asked])
        return {"data_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def __str__(self) -> str:
        """The name, without the path of the data, which says nothing to others."""
        return fields.to_text(self).replace(self.data, Path(self.data).name)

    def figures(self, answers: Answers) -> list[Figure]:
        prompts = [
            answers.encode(few_shot(problem, self.drawn(seed)))
            for seed in range(self.seeds)
            for problem in self.problems
        ]
        texts = answers.texts(prompts, Writing(self.tokens, STOPS))
        gold = [problem.gold for _ in range(self.seeds) for problem in self.problems]
        found = []
        for metric, read in (("strict", extract_stated), ("flexible", extract)):
            numbers = [read(text) for text in texts]
            right = [number == own for number, own in zip(numbers, gold, strict=True)]
            for name, values in ((metric, right), (f"invalid, {metric}", [number is None for number in numbers])):
                by_seed = np.array(values, np.float64).reshape(self.seeds, -1)
                found.append(Figure.of(str(self), name, by_seed))
        return found


@functools.cache
def _load(folder: str, part: str) -> list[Problem]:
    return load_gsm8k(Path(folder) / f"{part}.jsonl")
