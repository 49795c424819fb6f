"""Searched plans on a text that neither calibration nor choosing saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score
from kvjax.evaluate.sweep import identity_of
from kvjax.evaluate.text import Text, load_text, name_of, split_texts
from kvjax.models.model import Model
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.search import calibration, names_of
from kvjax.tuner.simulate import Simulator

FIGURES = ("kld", "nll", "top1")


def check_texts_differ(calibrated: Text, judged: Text) -> None:
    """Refuses to judge plans on what they were chosen by.

    Args:
      calibrated: what a search calibrates on, as for `kvjax.tuner.search.calibration`.
      judged: what its plans are judged on, likewise.

    Raises:
      KvjaxError: a text is on both sides, by whatever name; or it cannot be read.
    """
    seen = {_content(text) for text in split_texts(calibrated)}
    for text in split_texts(judged):
        if _content(text) in seen:
            raise KvjaxError(
                f"{name_of(text)} is both calibrated on and judged on; expected another text to judge on"
            )


def _content(text: Text) -> str | tuple[int, ...]:
    return load_text(text) if isinstance(text, str | Path) else tuple(map(int, text))


def make_judge(model: Model, calibrated: Text, judged: Text, context: int, windows: int, folder: Path) -> Evaluations:
    """Makes what evaluates plans on the first windows of a judged text; it gives `FIGURES`.

    Args:
      model: the model whose caches are judged.
      calibrated: what the plans were searched on.
      judged: what they are judged on, as for `kvjax.tuner.search.calibration`.
      context: tokens a window.
      windows: windows of each judged text.
      folder: keeps the figures.

    Raises:
      KvjaxError: a text is on both sides, cannot be read, or is too short.
    """
    check_texts_differ(calibrated, judged)
    cut = calibration(model, judged, context, windows, 0)
    made: list[Simulator] = []

    def evaluate(plan: CachePlan) -> dict[str, Any]:
        made[:] = made or [Simulator(model, cut)]  # when it is first needed
        score = Score.of(made[0].score(plan), cut)
        return {figure: getattr(score, figure) for figure in FIGURES}

    return Evaluations(folder, identity_of(model, names_of(judged), cut, "streaming", windows), evaluate, FIGURES)
