"""Searched plans on windows that calibration did not see: those that choose, and those that judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kvjax.caches.plan import CachePlan
from kvjax.checks import check_whole
from kvjax.evaluate.calibrated import calibration, check_judged, names_of
from kvjax.evaluate.perplexity import Score
from kvjax.evaluate.sweep import identity_of
from kvjax.evaluate.text import Text, check_disjoint, check_unseen
from kvjax.models.model import Model
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.simulate import Simulator

FIGURES = ("kld", "nll", "top1")  # what cards state; what is judged has more


def make_judge(
    model: Model,
    calibrated: Text,
    seen: Int[np.ndarray, "v d"],
    judged: Text,
    context: int,
    windows: int,
    folder: Path,
) -> Evaluations:
    """Makes what evaluates plans on the first windows of a judged text.

    It gives `FIGURES`, `kld_se`, and `window_kld`, the mean KL of every window.

    Args:
      model: the model whose caches are judged.
      calibrated: what the plans were searched on.
      seen: its windows that plans were found and chosen on, token ids.
      judged: what they are judged on, as for `kvjax.tuner.search.calibration`.
      context: tokens a window.
      windows: windows of each judged text.
      folder: keeps the figures.

    Raises:
      KvjaxError: a text is on both sides, by whatever name, cannot be read, or is too short.
    """
    check_unseen(judged, calibrated)
    cut = calibration(model, judged, context, windows, 0)
    check_disjoint(cut, seen)
    check_judged(model, cut)
    return _evaluations(model, judged, cut, windows, 0, folder)


def make_validation(
    model: Model, calibrated: Text, context: int, windows: int, offset: int, count: int, folder: Path
) -> tuple[Int[np.ndarray, "v d"], Evaluations] | None:
    """Makes what evaluates plans on the windows that follow those calibrated on, and gives these; None where none do.

    Args:
      model: whose caches are evaluated.
      calibrated: what plans are searched on, as for `kvjax.tuner.search.calibration`.
      context: tokens a window.
      windows: of each text that are calibrated on.
      offset: tokens of each text that are skipped before those.
      count: windows of each text that validate.
      folder: keeps the figures.

    Raises:
      KvjaxError: a text is too short, or the count is no whole number.
    """
    if not check_whole("validation", count, 0):
        return None
    offset += windows * context
    cut = calibration(model, calibrated, context, count, offset)
    return cut, _evaluations(model, calibrated, cut, count, offset, folder)


def _evaluations(
    model: Model, text: Text, cut: Int[np.ndarray, "w n"], windows: int, offset: int, folder: Path
) -> Evaluations:
    made: list[Simulator] = []

    def evaluate(plan: CachePlan) -> dict[str, Any]:
        made[:] = made or [Simulator(model, cut)]  # when it is first needed
        score = Score.of(made[0].score(plan), cut)
        figures = {figure: getattr(score, figure) for figure in (*FIGURES, "kld_se")}
        return figures | {"window_kld": score.per_token.kld.mean(1).tolist()}

    identity = identity_of(model, names_of(text), cut, "streaming", windows, offset)
    return Evaluations(folder, identity, evaluate, FIGURES)
