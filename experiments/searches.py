"""Searches for the same budget on the same evaluations: the hypervolume of their fronts, evaluation by evaluation.

    python -m experiments.searches --config=configs/searches.py --workdir=DIR

The objectives are nominal bits and KL divergence, or its logarithm; the reference point is the budget and the KL of
the worst uniform cache. Writes DIR/searches.jsonl and draws DIR/searches.png.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from ml_collections import config_dict

from experiments import program
from experiments.pareto import save_figure
from experiments.tune import Bars, calibration, make_search
from kvjax import records
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.tuner.search import Search
from kvjax.tuner.space import hypervolume

SEARCHES: dict[str, dict[str, str]] = {
    "NSGA-II": {"method": "nsga2", "prune": "none", "cluster": "none"},
    "NSGA-II, pruned and clustered": {"method": "nsga2", "prune": "nominal", "cluster": "group"},
    "knapsack, predicted errors": {"method": "knapsack", "error": "predicted"},
    "knapsack, e_o": {"method": "knapsack", "error": "e_o"},
}
Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    file = workdir / "searches.jsonl"
    if not file.exists():
        records.append_rows(file, _compare(config, workdir))
    rows = records.read_rows(file)
    draw(rows, workdir / "searches.png")
    for name in SEARCHES:
        last = [row for row in rows if row["search"] == name][-1]
        volumes = f"hypervolume {last['hypervolume']:.4f}, of log10 KL {last['hypervolume_log']:.3f}"
        print(f"{name:32s} {last['evaluations']:4d} evaluations + {last['sensitivity']:.1f}: {volumes}")


def _compare(config: config_dict.ConfigDict, workdir: Path) -> list[Row]:
    model = load(config.model, config.dtype)
    windows = calibration(config, model)
    first = make_search(config, model, windows, workdir)
    worst = max(first.evaluations(plan)["kld"] for plan in first.uniform)
    start, compiled = time.perf_counter(), records.CompileSeconds()
    with Bars() as first.progress:
        first.errors()
    seconds = time.perf_counter() - start - compiled.total()
    rows = []
    for name, settings in SEARCHES.items():
        own = config_dict.ConfigDict({**config.to_dict(), **settings})
        search = make_search(own, model, windows, workdir)
        search.share(first)
        with Bars() as search.progress:
            plans = search.plans()
        one = _seconds_an_evaluation(search, plans)
        uses = own.method == "knapsack" or own.prune != "none"
        extra = {"search": name, "sensitivity": seconds / one if uses else 0.0, "seconds_an_evaluation": one}
        identity = {"experiment": "searches", **search.identity, "budget": own.budget, "seed": own.seed}
        rows += [identity | extra | row | records.provenance() for row in _course(search, plans, worst)]
    return rows


def _course(search: Search, plans: list[CachePlan], worst: float) -> list[Row]:
    """The hypervolume after every evaluation that was not made before; trials that repeat a plan cost nothing."""
    points: list[tuple[float, float]] = []
    rows = []
    for count, plan in enumerate(dict.fromkeys(plans), 1):
        bits, kld = plan.bits_nominal, search.evaluations(plan)["kld"]
        points.append((bits, kld))
        logs = [(b, math.log10(k)) for b, k in points]
        volumes = {
            "hypervolume": hypervolume(points, (search.bits.budget, worst)),
            "hypervolume_log": hypervolume(logs, (search.bits.budget, math.log10(worst))),
        }
        rows.append({"evaluations": count, "cache": str(plan), "bits_nominal": bits, "kld": kld, **volumes})
    return rows


def _seconds_an_evaluation(search: Search, plans: list[CachePlan]) -> float:
    """The median: the first ones compile."""
    seconds = sorted(search.evaluations(plan)["seconds"] for plan in plans)
    return seconds[len(seconds) // 2]


def draw(rows: list[Row], file: Path) -> None:
    """Hypervolume by evaluations, and the fronts."""
    figure, axes = plt.subplots(1, 2, figsize=(12.4, 4.8), layout="constrained")
    for name, marker in zip(SEARCHES, "so^v", strict=True):
        own = [row for row in rows if row["search"] == name]
        spent = [row["evaluations"] + row["sensitivity"] for row in own]
        axes[0].plot(spent, [row["hypervolume_log"] for row in own], "-" + marker, ms=4, markevery=0.1, label=name)
        points = sorted((row["bits_nominal"], row["kld"]) for row in own)
        front = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
        axes[1].plot(*zip(*front, strict=True), marker, ms=5, ls="-", lw=1, drawstyle="steps-post", label=name)
    axes[0].set(xscale="log", xlabel="evaluations of the model (sensitivity counted in them)")
    axes[0].set(ylabel="hypervolume of nominal bits and log10 KL")
    axes[1].set(yscale="log", xlabel="nominal bits", ylabel="KL divergence from the dense run (nats per token)")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[1].legend()
    figure.suptitle("{model}, {text}, {windows} × {context} tokens of each text".format(**rows[0]), fontsize=10)
    save_figure(figure, file)


if __name__ == "__main__":
    program.run(main, "configs/searches.py")
