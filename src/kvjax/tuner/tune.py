"""The search as one call: a budget of bits in, the best plan with its card out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.caches.plan import CachePlan
from kvjax.checks import check_path
from kvjax.evaluate.calibrated import calibration, names_of
from kvjax.evaluate.sweep import identity_of, kept_in
from kvjax.evaluate.text import Text
from kvjax.models.model import Model, check_model
from kvjax.tuner.card import make_card, write_plan
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.judge import make_judge, make_validation
from kvjax.tuner.layer_errors import Row
from kvjax.tuner.search import Progress, Search
from kvjax.tuner.settings import SearchSettings


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning:
    """What a search came to.

    Attributes:
      plan: the best plan within the budget.
      rows: a row for every plan that was compared, the chosen one again at the end.
      card: where the plan comes from and what to expect of it.
    """

    plan: CachePlan
    rows: list[Row]
    card: dict[str, Any]

    @classmethod
    def of(cls, search: Search, judge: Evaluations | None = None) -> Tuning:
        """Runs a search to its end; a judge evaluates the chosen plan on a text that the search did not see."""
        started = time.perf_counter()
        rows = search.front(search.plans())
        plan = CachePlan.parse(rows[-1]["cache"], search.model.config)
        return cls(plan, rows, make_card(search, rows, time.perf_counter() - started, judge))

    def save(self, path: str | Path) -> None:
        """Writes the plan and its card to a .yaml file, which every `cache` takes.

        Raises:
          KvjaxError: the name ends otherwise, or the file cannot be written.
        """
        write_plan(check_path("path", path), self.plan, self.card)

    def __repr__(self) -> str:
        figures = f"{self.plan.bits_asymptotic:.2f} bits with scales, KL {self.card['expected']['kld']:.3g}"
        return f"<Tuning {self.plan}: {figures}, of {len(self.rows) - 1} plans>"


def tune(
    model: Model,
    text: Text,
    budget: float = 3.25,
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    context: int = 1024,
    windows: int = 2,
    offset: int = 0,
    validation: int = 1,
    judged_on: Text | None = None,
    **settings: Any,
) -> Tuning:
    """Searches the best plan for a budget of bits.

    Args:
      model: what `kvjax.load` gives.
      text: what to calibrate on, see `kvjax.evaluate.text.read_ids`; names of several are separated by commas.
      budget: bits per element of K and V; nominal ones unless `budget_of` is asymptotic or real.
      folder: keeps what was measured: a search that is cut off goes on where it was, and other budgets and methods
        share it. None: nothing is kept.
      progress: called as progress(stage, done, total), see `kvjax.tuner.search.Progress`.
      context: tokens a window.
      windows: windows of each text.
      offset: tokens of each text that are skipped first.
      validation: windows of each text, after those, that choose among the best plans; with 0 the first ones choose.
      judged_on: another text, whose first windows judge the plan; the card then says how good it is there.
      settings: more of `kvjax.tuner.settings.SearchSettings`.

    Raises:
      KvjaxError: one line that says what was expected; arguments are checked before anything is computed.
    """
    check_model(model)
    checked = SearchSettings.of({"budget": budget, **settings})
    cut = calibration(model, text, context, windows, offset)
    identity = identity_of(model, names_of(text), cut, "streaming", windows, offset)
    with kept_in(folder) as where:
        sizes = context, windows, offset, validation
        chooser = make_validation(model, text, *sizes, where / "validation")
        judge = None
        if judged_on is not None:
            seen = np.concatenate([cut, chooser[0]]) if chooser else cut
            judge = make_judge(model, text, seen, judged_on, context, windows, where / "judgements")
        search = Search(checked, model, cut, identity, where, progress, chooser and chooser[1])
        return Tuning.of(search, judge)
