"""A plan file: the plan in the grammar, and its card, which says where the plan comes from and what to expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import plugins_of
from kvjax.errors import KvjaxError
from kvjax.files import write_atomically
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.judge import FIGURES
from kvjax.tuner.layer_errors import Row
from kvjax.tuner.search import Search
from kvjax.tuner.space import pareto

EXPECTED = ("kld", "nll", "top1", "bits_nominal", "bits_asymptotic", "bits_real")
CALIBRATION = ("text", "tokens_sha256", "context", "windows", "offset", "dtype")


def make_card(search: Search, rows: list[Row], seconds: float, judge: Evaluations | None = None) -> dict[str, Any]:
    """The card of the plan that a search chose.

    Args:
      search: the search that ended.
      rows: `search.front`'s, the chosen one last.
      seconds: that the search took.
      judge: evaluates the plan on a text that the search did not see.

    Raises:
      KvjaxError: what the judge raises.
    """
    *others, chosen = rows
    identity, settings = search.identity, search.settings
    front = pareto(others, lambda row: row["bits_asymptotic"], lambda row: row["kld"])
    plan = CachePlan.parse(chosen["cache"], search.model.config)
    plugins = plugins_of(plan.specs)
    return {
        "model": identity["model"],
        "model_sha256": identity["model_sha256"],
        **({"plugins": plugins} if plugins else {}),
        "calibration": {key: identity[key] for key in CALIBRATION},
        **({"learned_from": identity["learned_from"]} if plan.calibrated else {}),
        "search": {
            **{key: getattr(settings, key) for key in ("method", "objective", "error", "seed")},
            "candidates": [str(spec) for spec in search.candidates],
            "budget": search.bits.budget,
            "budget_of": str(search.bits),
            "seconds": round(seconds, 1),
        },
        "expected": {key: chosen[key] for key in EXPECTED},
        **({"validation": _figures(search.validation, plan)} if search.validation else {}),
        **({"judged": _figures(judge, plan)} if judge else {}),
        "front": [[row["bits_asymptotic"], row["kld"]] for row in front],
        "made_with": {key: chosen[key] for key in ("device", "versions", "git")},
    }


def _figures(evaluations: Evaluations, plan: CachePlan) -> dict[str, Any]:
    """The plan's on other windows, and which these are."""
    figures = evaluations(plan)
    return {key: evaluations.identity[key] for key in CALIBRATION} | {key: figures[key] for key in FIGURES}


def write_plan(file: Path, plan: CachePlan, card: dict[str, Any]) -> None:
    """Writes a plan file, which every `cache` takes.

    Raises:
      KvjaxError: its name does not end in .yaml or .yml, or it cannot be written.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise KvjaxError(f"{file} is no name of a plan file; expected one that ends in .yaml")
    text = yaml.safe_dump({"plan": str(plan), "card": card}, sort_keys=False, width=1000)
    write_atomically(file, text.encode())
