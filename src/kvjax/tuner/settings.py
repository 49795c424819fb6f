"""What a search is asked for."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from kvjax.checks import check_real, check_whole, show
from kvjax.errors import KvjaxError
from kvjax.extras import needed

CHOICES = {
    "budget_of": ("nominal", "asymptotic", "real"),
    "mode": ("kivi", "token"),
    "method": ("knapsack", "nsga2", "refine"),
    "by": ("layer", "head"),
    "error": ("predicted", "kld", "e_o"),
    "prune": ("kl", "paper", "none"),
    "cluster": ("group", "singletons", "none"),
    "objective": ("kld", "nll", "top1", "agreement", "gsm8k"),
}
TYPES: dict[str, tuple[type, type]] = {  # by a field's type: what makes a value, and of what
    "str": (str, str),
    "int": (int, numbers.Integral),
    "float": (float, numbers.Real),
}
ANSWERS = ("agreement", "gsm8k")  # objectives that need problems to answer


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """A search's settings, beside its model and its windows.

    Attributes:
      mode: of the default candidates: kivi or token.
      candidates: caches of the plan grammar, separated by commas; {2, 4, 8} bits of K and V where empty.
      budget: bits per element.
      budget_of: which bits: nominal, asymptotic (with scales), or real (all that is allocated).
      budget_context: tokens that real bits are of.
      method: knapsack, nsga2, or refine (the knapsack's plans of each method alone and of all, made better).
      by: what chooses its candidate: each layer; head adds the knapsack's plan of a choice for each kv head.
      error: of single layers, for the knapsack: predicted, kld (measured, slower) or e_o.
      prune: every layer's candidates, for nsga2: kl keeps the front of bits and KL; paper keeps that of nominal bits
        and e_o, as KVTuner does; or none.
      cluster: of layers, for nsga2: noise as one group, or singletons; or none.
      objective: what is made small: kld or nll; or large: top1, agreement (of greedy answers), gsm8k.
      problems: GSM8K's file: agreement's prompts, gsm8k's problems.
      count, shots: problems taken, and how many more begin the prompts of gsm8k.
      points: plans of the knapsack's front that are evaluated.
      trials: of nsga2.
      rounds: of refine, at most.
      seed: of draws.
      worker: nsga2 processes that share a folder need numbers of their own.
    """

    mode: str = "kivi"
    candidates: str = ""
    budget: float = 3.25
    budget_of: str = "nominal"
    budget_context: int = 4096
    method: str = "knapsack"
    by: str = "layer"
    error: str = "predicted"
    prune: str = "kl"
    cluster: str = "group"
    objective: str = "kld"
    problems: str = ""
    count: int = 20
    shots: int = 4
    points: int = 8
    trials: int = 200
    rounds: int = 3
    seed: int = 0
    worker: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SearchSettings:
        """The settings of some values, the others at their defaults.

        Raises:
          KvjaxError: an unknown name, or a value of another type or out of range.
        """
        fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise KvjaxError(f"unknown setting {name!r}; expected {', '.join(fields)}")
        return cls(**{name: _typed(name, value, fields[name]) for name, value in values.items()})

    def __post_init__(self) -> None:
        """Raises KvjaxError for a value out of range."""
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise KvjaxError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(values)}")
        for name in ("points", "trials", "rounds", "count", "budget_context"):
            if getattr(self, name) < 1:
                raise KvjaxError(f"{name}={getattr(self, name)}; expected at least 1")
        if min(self.seed, self.worker, self.shots) < 0 or self.seed >= 2**32:
            seeds = f"seed={self.seed}, worker={self.worker}, shots={self.shots}"
            raise KvjaxError(f"{seeds}; expected at least 0, and a seed below 2**32")
        if not 0 < self.budget < math.inf:
            raise KvjaxError(f"budget={self.budget}; expected bits above 0")
        if self.method == "nsga2":
            with needed("optuna"):
                import optuna  # noqa: F401 - asked before errors are measured
        if self.objective in ANSWERS and not self.problems:
            raise KvjaxError(f"objective={self.objective} needs problems; expected GSM8K's jsonl file")


def _typed(name: str, value: Any, field_type: str) -> Any:
    make, accepted = TYPES[field_type]
    if not isinstance(value, accepted):
        raise KvjaxError(f"{name}={show(value)}; expected {make.__name__}")
    if make is int:
        return check_whole(name, value, -(2**63), 2**63 - 1)
    return check_real(name, value, "a float") if make is float else value
