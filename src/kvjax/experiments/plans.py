"""Searched plans at several budgets against uniform caches, on texts that the search never saw.

    kvjax plans --workdir=DIR

Every search shares DIR with the others: what one measured, none measures again. The plans go to DIR/plans, rows to
DIR/plans.jsonl, a picture to DIR/plans.png. Differences between two caches are paired: of the same windows,
whose means give the 95 % interval by Student's t.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import hosts, records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import mean_and_interval
from kvjax.evaluate.text import check_unseen, strip_paths
from kvjax.experiments import bars, program, style
from kvjax.experiments.tune import Chooser, calibration, make_search, seen_by, settings_of, validation
from kvjax.files import write_atomically
from kvjax.models.model import Model
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.judge import make_judge
from kvjax.tuner.space import pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Found = tuple[str, float, CachePlan, list[CachePlan], Row]
"""Of a search: name, budget, plan, the uniform plans that fit the budget, and the plan's own figures."""


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    settings_of(config)  # refuses bad values before the model is loaded
    budgets = _budgets(config)
    check_unseen(config.judged_on, config.text)
    model = program.load(config, config.judged_on)
    windows = calibration(config, model)
    sizes = config.context, config.judged_windows
    chooser = validation(config, model, workdir)
    seen = seen_by(windows, chooser)
    judges = {
        text: make_judge(model, config.text, seen, text, *sizes, workdir / "judged")
        for text in split_list(config.judged_on)
    }
    found = _search(config, model, windows, budgets, workdir, chooser)
    rows = []
    for text, judge in judges.items():
        plans = list(dict.fromkeys(plan for _, _, plan, uniform, _ in found for plan in [plan, *uniform]))
        with bars.shown() as tell:
            for count, plan in enumerate(plans, 1):
                judge(plan)
                tell(f"judging on {Path(text).name}", count, len(plans))
        firsts = {each[1]: each for each in reversed(found)}
        rows += [row for each in found for row in _rows(config, model, judge, firsts[each[1]], *each)]
    rows = [row | records.provenance() for row in rows]
    hosts.on_first(lambda: records.write_rows(workdir / "plans.jsonl", rows))
    hosts.on_first(lambda: style.write(workdir / "plans.png", draw, rows))
    Console(width=160).print(_table(rows))


def _budgets(config: config_dict.ConfigDict) -> list[float]:
    try:
        return [float(budget) for budget in config.budgets.split(",")]
    except ValueError:
        raise KvjaxError(f"budgets={config.budgets!r}; expected numbers of bits, separated by commas") from None


def _search(
    config: config_dict.ConfigDict,
    model: Model,
    windows: np.ndarray,
    budgets: list[float],
    workdir: Path,
    chooser: Chooser | None,
) -> list[Found]:
    """What every search came to."""
    shared, found = None, []
    for name, settings in config.searches.items():
        for budget in budgets:
            own = config_dict.ConfigDict(config.to_dict())
            own.update(settings.to_dict() | {"budget": budget})
            try:
                search = make_search(own, model, windows, workdir, chooser)
            except KvjaxError as error:
                print(f"{name}: {error}")
                continue
            if shared:
                search.share(shared)
                search.layer_errors.share(shared.layer_errors)
            shared = search
            with bars.shown() as search.progress:
                plan = search.choose([*search.plans(), *search.uniform])
            file = workdir / "plans" / f"{name.replace(', ', '-').replace(' ', '-')}-{budget:g}.yaml"
            hosts.on_first(functools.partial(write_atomically, file, f"plan: {plan}\n".encode()))
            own_figures = {"predicted": search.predicted(plan), "kld_calibrated": search.evaluations(plan)["kld"]}
            found.append((name, budget, plan, [*filter(search.bits.fits, search.uniform)], own_figures))
    if not found:
        raise KvjaxError(f"no search of budgets={config.budgets} can be made; expected one at least")
    return found


def _rows(
    config: config_dict.ConfigDict,
    model: Model,
    judge: Evaluations,
    first: Found,
    name: str,
    budget: float,
    plan: CachePlan,
    uniform: list[CachePlan],
    calibrated: Row,
) -> list[Row]:
    """The plan's row, with its figures on the calibrated windows, and one for every uniform plan within its budget.

    These have what the plan is better by. Its own row has what it gains on the plan of the budget's first search.
    """
    dense = judge(CachePlan.parse("dense", model.config))
    common = {"experiment": "plans", **judge.identity, "calibrated_on": strip_paths(config.text)}
    common |= {"search": name, "budget": budget, "budget_of": config.budget_of, "method": config.method}
    rows: list[Row] = []
    for other in [plan, *uniform]:
        figures = judge(other)
        row = common | {"kind": "uniform" if other in uniform and rows else "searched", "cache": str(other)}
        row |= {"bits_nominal": other.bits_nominal, "bits_asymptotic": other.bits_asymptotic}
        context = judge.identity["context"]
        row |= {"bits_real": other.bits_real(context), "bits_peak": other.bits_peak(context)}
        row |= {key: figures[key] for key in ("kld", "kld_se", "nll", "top1")}
        row |= {"nll_increase": figures["nll"] - dense["nll"], "nll_dense": dense["nll"]}
        better = np.subtract(figures["window_kld"], judge(plan)["window_kld"])
        row["better_by"], row["ci95"] = mean_and_interval(better[:, None])
        rows.append(row)
    gain = np.subtract(judge(first[2])["window_kld"], judge(plan)["window_kld"])
    compared = dict(
        zip(("first_search", "gain", "gain_ci95"), (first[0], *mean_and_interval(gain[:, None])), strict=True)
    )
    return [rows[0] | calibrated | compared, *rows[1:]]


def draw(rows: list[Row]) -> Figure:
    """KL over bits with scales on every judged text: a line a search, uniform caches as points."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure, (axes,) = style.subplots(1, len(texts), (6.6 * len(texts), 5.4))
    for axis, text in zip(axes, texts, strict=True):
        here = [row for row in rows if row["text"] == text]
        _draw_searches(axis, here)
        axis.set(yscale="log", xlabel=style.BITS, ylabel=style.KL)
        axis.set_title(f"judged on {text}", fontsize=style.TITLE)
        axis.margins(x=0.1, y=0.08)
    said = "{model}: plans searched on {calibrated_on}, judged on {windows} windows of {context} tokens, {protocol}"
    bars = "; bars: one standard error" * any("kld_se" in row for row in rows)
    style.title(figure, said.format(**rows[0]) + "; lower left is better" + bars)
    style.legend(figure, axes[0])
    for axis, text in zip(axes, texts, strict=True):
        best = pareto(_uniform(rows, text).items(), lambda item: item[1][0], lambda item: item[1][1])
        style.name_points(axis, [point for _, point in best], style.short_names([cache for cache, _ in best])[0])
    return figure


def _draw_searches(axis: Axes, rows: list[Row]) -> None:
    """A line a search, and a mark a uniform cache."""
    uniform = _uniform(rows, rows[0]["text"])
    if uniform:
        axis.plot(*zip(*uniform.values(), strict=True), "x", color=style.GRAY, ms=4.5, label="uniform caches")
    for name, mark in zip(dict.fromkeys(row["search"] for row in rows), itertools.cycle(style.MARKS), strict=False):
        mine = [row for row in rows if row["kind"] == "searched" and row["search"] == name]
        bits, kld, errors = zip(
            *sorted((row["bits_asymptotic"], row["kld"], row.get("kld_se", math.nan)) for row in mine), strict=True
        )
        look: dict[str, Any] = {"fmt": f"{mark}-", "ms": 4.5, "lw": 1.4, "capsize": 2, "elinewidth": 1}
        axis.errorbar(bits, kld, errors, label=f"searched: {name}", **look)


def _uniform(rows: list[Row], text: str) -> dict[str, tuple[float, float]]:
    """Bits and KL of the uniform caches on a text."""
    own = [row for row in rows if row["kind"] == "uniform" and row["text"] == text]
    return {row["cache"]: (row["bits_asymptotic"], row["kld"]) for row in own}


def best_uniform(rows: list[Row], searched: Row) -> Row | None:
    """Of the uniform plans within a searched plan's budget, on its text, the one with the least KL."""
    keys = ("search", "budget", "text")
    same = [row for row in rows if row["kind"] == "uniform" and all(row[key] == searched[key] for key in keys)]
    return min(same, key=lambda row: row["kld"], default=None)


def _table(rows: list[Row]) -> Table:
    table = Table(title="{model}, calibrated on {calibrated_on}".format(**rows[0]), title_justify="left")
    for name in ("text", "search", "budget", "with scales", "KL", "nll +%", "best uniform", "its KL", "better by"):
        table.add_column(name, justify="right")
    for row in rows:
        if row["kind"] == "searched":
            other = best_uniform(rows, row)
            nll = f"{100 * row['nll_increase'] / row['nll_dense']:.2f}"
            figures = f"{row['budget']:g}", f"{row['bits_asymptotic']:.2f}", f"{row['kld']:.5f}", nll
            than = (other["cache"], f"{other['kld']:.5f}", difference(other)) if other else ("", "", "")
            table.add_row(row["text"], row["search"], *figures, *than)
    return table


def difference(row: Row) -> str:
    """What a uniform plan's KL is above the searched one's, with its 95 % interval."""
    return f"{row['better_by']:.5f} ± {row['ci95']:.5f}"


if __name__ == "__main__":
    program.run(main, "configs/plans.py")
