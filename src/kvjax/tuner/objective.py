"""What a search may measure of a plan beside KL, nll and top-1 agreement: answers to problems."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.tasks import Problem, accuracy, agreement, load_gsm8k
from kvjax.generation.generate import generate
from kvjax.models.model import Model
from kvjax.tuner.settings import ANSWERS, SearchSettings

NEW_TOKENS = {"agreement": 64, "gsm8k": 256}
Measure = Callable[[CachePlan], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A figure of plans, and what it depends on; nothing where the scores say it already."""

    identity: dict[str, Any]
    measure: Measure


def make_objective(settings: SearchSettings, model: Model) -> Objective:
    """The objective of some settings.

    Raises:
      KvjaxError: the problems cannot be read, or they are too few.
    """
    if settings.objective not in ANSWERS:
        return Objective({}, lambda plan: {})
    problems = load_gsm8k(Path(settings.problems))
    needed = settings.count + settings.shots
    if len(problems) < needed:
        raise KvjaxError(f"{settings.problems} has {len(problems)} problems; expected count + shots = {needed}")
    some, shots = problems[: settings.count], problems[settings.count : needed]
    asked = hashlib.sha256(json.dumps([[p.question, p.answer] for p in problems[:needed]]).encode()).hexdigest()
    identity = {
        "objective": settings.objective,
        "count": settings.count,
        "problems_sha256": asked,
        "shots": settings.shots if settings.objective == "gsm8k" else 0,
    }
    if settings.objective == "agreement":
        return Objective(identity, _measure_agreement(model, some))
    return Objective(identity, _measure_accuracy(model, some, shots))


def _measure_accuracy(model: Model, some: Sequence[Problem], shots: Sequence[Problem]) -> Measure:
    """The share of problems that are solved."""
    tokens = NEW_TOKENS["gsm8k"]
    return lambda plan: {"gsm8k": accuracy(model, plan, some, shots, max_new_tokens=tokens).share}


def _measure_agreement(model: Model, some: Sequence[Problem]) -> Measure:
    """The share of the dense run's answers that a plan repeats; the dense run is made once."""
    questions = [problem.question for problem in some]
    dense: list[list[list[int]]] = []

    def greedy(plan: CachePlan) -> list[list[int]]:
        return generate(model, questions, plan, max_new_tokens=NEW_TOKENS["agreement"], chat=True).tokens

    def measure(plan: CachePlan) -> dict[str, float]:
        if not dense:
            dense.append(greedy(CachePlan.parse("dense", model.config)))
        return {"agreement": agreement(dense[0], greedy(plan)).share}

    return measure
