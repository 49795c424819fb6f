"""Searches for the same budget, with as many evaluations each, over several seeds, judged on a text they never saw.

    kvjax searches --workdir=DIR

A search makes at most `trials` evaluations, those that measuring the layers' errors costs among them. A seed draws
NSGA-II's trials and the predictions' tokens. The plan of least KL within each of `judged_budgets` is then judged on
other texts. A row of DIR/searches.jsonl is one search with one seed. What is there is not searched again, and a
search that was cut off goes on. Prints medians and ranges over the seeds, and draws DIR/searches.png.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
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
from kvjax.evaluate.sweep import kept_in
from kvjax.experiments import bars, program, style
from kvjax.experiments.tune import calibration, make_search
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.judge import make_judge
from kvjax.tuner.search import Search
from kvjax.tuner.space import hypervolume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEARCHES: dict[str, dict[str, str]] = {
    "NSGA-II": {"method": "nsga2", "prune": "none", "cluster": "none"},
    "NSGA-II, pruned by e_o, clustered (KVTuner)": {"method": "nsga2", "prune": "paper", "cluster": "group"},
    "NSGA-II, pruned by KL, clustered": {"method": "nsga2", "prune": "kl", "cluster": "group"},
    "NSGA-II, pruned by KL": {"method": "nsga2", "prune": "kl", "cluster": "none"},
    "knapsack, predicted KL": {"method": "knapsack", "error": "predicted"},
    "knapsack, e_o": {"method": "knapsack", "error": "e_o"},
}
RIVAL = "NSGA-II"  # what the rivals' names begin with
NOISE = 1e-7  # of a KL in float32, in nats
Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    budgets = _budgets(config)
    model = program.load(config)
    sizes = config.context, config.judged_windows
    windows = calibration(config, model)
    judge = make_judge(model, config.text, windows, config.judged_on, *sizes, workdir / "judgements")
    first = make_search(config, model, windows, workdir)
    file, asked = workdir / "searches.jsonl", _asked(first, judge, config)
    for seed in range(config.seed, config.seed + config.seeds):
        for name in SEARCHES:
            point = asked | {"search": name, "seed": seed}
            if hosts.on_first(functools.partial(records.find_row, file, point)) is None:
                row = _run(first, name, seed, _sensitivity(first, workdir / "costs.jsonl"), judge, budgets)
                hosts.on_first(functools.partial(records.append_row, file, point | row | records.provenance()))
    rows = hosts.on_first(lambda: records.find_rows(file, asked))
    hosts.on_first(lambda: style.write(workdir / "searches.png", draw, rows))
    Console(width=200).print(_table(rows))


def _budgets(config: config_dict.ConfigDict) -> list[float]:
    try:
        budgets = [float(budget) for budget in split_list(config.judged_budgets)]
    except ValueError:
        raise KvjaxError(f"judged_budgets={config.judged_budgets!r}; expected numbers of bits") from None
    if not all(0 < budget <= config.budget for budget in budgets):
        most = f"{config.budget:g}"
        raise KvjaxError(f"judged_budgets={config.judged_budgets}; expected bits of at most the budget, {most}")
    if config.seeds < 1:
        raise KvjaxError(f"seeds={config.seeds}; expected at least 1")
    return budgets


def _asked(first: Search, judge: Evaluations, config: config_dict.ConfigDict) -> Row:
    """What the rows of a comparison share."""
    judged = {f"judged_{key}": judge.identity[key] for key in ("tokens_sha256", "windows")}
    return {
        "experiment": "searches",
        **first.identity,
        "candidates": ",".join(map(str, first.candidates)),
        "budget": first.bits.budget,
        "budget_of": first.bits.kind,
        "trials": config.trials,
        "judged_on": judge.identity["text"],
        **judged,
        "judged_budgets": config.judged_budgets,
    }


# ---- one search


def _run(
    first: Search, name: str, seed: int, sensitivity: float, judge: Evaluations, budgets: Sequence[float]
) -> Row:
    """One search with one seed: bits and KL of its plans in order, and its choices on the judged text."""
    settings = SEARCHES[name]
    cost = 0.0 if settings.get("prune") == settings.get("cluster") == "none" else sensitivity
    count = max(1, first.settings.trials - math.ceil(cost))
    asked: dict[str, Any] = {**settings, "seed": seed, "trials": count, "points": count}
    search = Search(
        dataclasses.replace(first.settings, **asked), first.model, first.windows, first.identity, first.folder
    )
    search.share(first)
    with bars.shown() as search.progress:
        plans = list(dict.fromkeys(search.plans()))
    evaluated = {plan: (search.bits.of_plan(plan), search.evaluations(plan)["kld"]) for plan in plans}
    reference = first.bits.budget, max(first.evaluations(plan)["kld"] for plan in first.uniform)
    judged = [row for budget in budgets if (row := _judged(evaluated, budget, judge))]
    return {"sensitivity": cost, "reference": reference, "evaluated": list(evaluated.values()), "judged": judged}


def _judged(evaluated: dict[CachePlan, tuple[float, float]], budget: float, judge: Evaluations) -> Row | None:
    """The plan that a search would choose for a budget, on the judged text; None where no plan fits."""
    within = [plan for plan, (bits, _) in evaluated.items() if bits <= budget + 1e-9]
    if not within:
        return None
    plan = min(within, key=lambda plan: evaluated[plan][1])
    bits, kld = evaluated[plan]
    return {"budget": budget, "cache": str(plan), "bits": bits, "kld_calibrated": kld, "kld": judge(plan)["kld"]}


def _sensitivity(search: Search, file: Path) -> float:
    """What measuring the errors of all layers costs, in evaluations of a plan; timed once, when all is compiled."""
    point = {"experiment": "sensitivity cost", **search.identity, "candidates": ",".join(map(str, search.candidates))}
    row = hosts.on_first(lambda: records.find_row(file, point))
    if row is None:
        one = statistics.median(search.evaluations(plan)["seconds"] for plan in search.uniform)
        search.errors()
        with kept_in(None) as folder:
            again = Search(search.settings, search.model, search.windows, search.identity, folder)
            again.share(search)
            start = time.perf_counter()
            again.errors()
            seconds = time.perf_counter() - start
        row = point | {"seconds": seconds, "seconds_an_evaluation": one, "evaluations": seconds / one}
        row = hosts.on_first(functools.partial(dict, row))  # clocks differ
        hosts.on_first(functools.partial(records.append_row, file, row | records.provenance()))
    return float(row["evaluations"])


# ---- what the rows say


def course(row: Row) -> list[float]:
    """The hypervolume of bits and log10 KL after every evaluation; the reference is the row's."""
    points = [(bits, math.log10(max(kld, NOISE))) for bits, kld in row["evaluated"]]
    bits, kld = row["reference"]
    return [hypervolume(points[:count], (bits, math.log10(kld))) for count in range(1, len(points) + 1)]


def summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: medians over the seeds, ranges in brackets."""
    by_name = _by_name(rows)
    courses = {name: [course(row) for row in own] for name, own in by_name.items()}
    goal = max((each[-1] for name in courses if name.startswith(RIVAL) for each in courses[name]), default=math.inf)
    budgets = sorted({each["budget"] for row in rows for each in row["judged"]})
    lines = []
    for name, own in by_name.items():
        counts = [len(row["evaluated"]) for row in own]
        reached = [next((i for i, v in enumerate(each, 1) if v >= goal), math.inf) for each in courses[name]]
        median = statistics.median_high(reached)
        figures = [
            spread([each[-1] for each in courses[name]], ".2f"),
            "never" if median == math.inf else f"{median}",
        ]
        figures += [spread(_klds(own, budget), ".4f") for budget in budgets]
        lines.append([name, str(len(own)), spread(counts, "g"), f"{own[0]['sensitivity']:.1f}", *figures])
    header = ["search", "seeds", "plans evaluated", "sensitivity", "hypervolume", f"{RIVAL}'s best reached after"]
    return [*header, *(f"unseen KL at {budget:g} bits" for budget in budgets)], lines


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where there is one."""
    if not values:
        return "none"
    low, middle, high = (f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _klds(rows: Sequence[Row], budget: float) -> list[float]:
    """On the judged text, of the plans chosen for a budget."""
    return [each["kld"] for row in rows for each in row["judged"] if each["budget"] == budget]


def _by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: own for name in SEARCHES if (own := [row for row in rows if row["search"] == name])}


def _table(rows: Sequence[Row]) -> Table:
    header, lines = summary(rows)
    title = "{model}, calibrated on {text}, judged on {judged_on}".format(**rows[0])
    table = Table(*header, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    return table


def draw(rows: Sequence[Row]) -> Figure:
    """Hypervolume by evaluations, and the chosen plans on the judged text: medians, and ranges over the seeds."""
    figure, (axes,) = style.subplots(1, 2, (12.4, 5.4))
    for (name, own), mark in zip(_by_name(rows).items(), style.MARKS, strict=False):
        _draw_courses(axes[0], own, mark)
        _draw_judged(axes[1], own, name, mark)
    axes[0].set(xscale="log", xlabel="evaluations of the model (sensitivity counted in them)")
    axes[0].set(ylabel="hypervolume of bits and log10 KL, calibrated text; more is better")
    axes[1].set(yscale="log", xlabel="budget, {budget_of} bits".format(**rows[0]))
    axes[1].set(ylabel="KL divergence from the dense run on {judged_on} (nats per token)".format(**rows[0]))
    axes[1].set_xticks(sorted({each["budget"] for row in rows for each in row["judged"]}))
    seeds = len({row["seed"] for row in rows})
    said = "{model}, searched on {text}, {windows} × {context} tokens; medians and ranges of {seeds} seeds"
    style.title(figure, said.format(**rows[0], seeds=seeds))
    style.legend(figure, axes[1])
    return figure


def _draw_courses(axis: Axes, rows: Sequence[Row], marker: str) -> None:
    """A line, and a band over the seeds; a search that has ended keeps its last value."""
    courses = [course(row) for row in rows]
    longest = max(map(len, courses))
    values = np.array([each + each[-1:] * (longest - len(each)) for each in courses])
    spent = rows[0]["sensitivity"] + np.arange(1, longest + 1)
    (line,) = axis.plot(spent, np.median(values, 0), "-" + marker, ms=4, markevery=0.1)
    axis.fill_between(spent, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def _draw_judged(axis: Axes, rows: Sequence[Row], name: str, marker: str) -> None:
    """A point per budget, with a bar over the seeds."""
    budgets = sorted({each["budget"] for row in rows for each in row["judged"]})
    klds = [_klds(rows, budget) for budget in budgets]
    middle = np.array([statistics.median(each) for each in klds])
    reach = np.abs(np.array([[min(each) for each in klds], [max(each) for each in klds]]) - middle)
    axis.errorbar(budgets, middle, reach, fmt="-" + marker, ms=4, lw=1, capsize=2, label=name)


if __name__ == "__main__":
    program.run(main, "configs/searches.py")
