"""KVTuner's tables 2 and 9 on a model, and its lemma 1: which heads, layers and widths make keys matter.

    kvjax head_errors --workdir=DIR

e_k, e_v, e_a and e_o of every head (`kvjax.tuner.sensitivity`, on a full-precision run), and KL divergence and
perplexity of the model with that cache in all layers (streaming). Appends a row per cache to DIR/head_errors.jsonl,
what is there already left out, and draws DIR/head_errors.png. The row of the dense cache has the largest attention
weight of every head: the lemma says that heads with a concentrated pattern stand low precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from ml_collections import config_dict
from scipy.stats import spearmanr

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.evaluate.text import read_windows
from kvjax.experiments import program, style
from kvjax.tables import align_columns
from kvjax.tuner.sensitivity import RELATIVE, head_errors
from kvjax.tuner.simulate import Simulator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERRORS = ("e_k", "e_v", "e_a", "e_o")
DIGITS = 4  # of an error in rows
MODES = ("token", "kivi")
ALONE = {4: ("k4v8", "k8v4"), 2: ("k2v8", "k8v2")}  # by width: keys in it alone, values in it alone
SHOWN = ("k4v8@token", "k4v8@kivi", "k8v4@kivi")  # in the picture
HEADER = ("cache", *ERRORS, "KL", "perplexity")
Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    file, model = workdir / "head_errors.jsonl", load(config.model, "float32")
    windows = read_windows(config.text, model, config.context, config.windows, config.offset)
    point = {"experiment": "head_errors", **config.to_dict(), "relative_errors": RELATIVE}
    del point["caches"]
    plans = [CachePlan.parse(name, model.config) for name in split_list(config.caches)]
    left = [plan for plan in plans if records.find_row(file, point | {"cache": str(plan)}) is None]
    if left:
        simulator = Simulator(model, windows)
        errors = [head_errors(simulator, i, [plan.specs[i] for plan in left]) for i in range(model.config.layers)]
        dense = {"largest_weight": _rounded([layer[0]["largest_weight"] for layer in errors])}
        if records.find_row(file, point | {"cache": "dense"}) is None:
            records.append_row(file, point | _scores(simulator, simulator.dense_plan) | dense | records.provenance())
        for i, plan in enumerate(left):
            own = {name: _rounded([layer[i][name] for layer in errors]) for name in ERRORS}
            records.append_row(file, point | _scores(simulator, plan) | own | records.provenance())
    rows = records.find_rows(file, point)
    print(align_columns([HEADER, *pair_lines(rows)], left=1))
    if lines := key_lines(rows):
        print("\n" + align_columns([KEYS_HEADER, *lines], left=1))
    if {*SHOWN} <= {row["cache"] for row in rows}:
        style.write(workdir / "head_errors.png", draw, rows)
    print(f"rows: {file}")


def _scores(simulator: Simulator, plan: CachePlan) -> Row:
    scores = simulator.score(plan)
    return {"cache": str(plan), "kld": float(scores.kld.mean()), "nll": float(scores.nll.mean())}


def _rounded(layers: Sequence[Float[np.ndarray, "H"]]) -> list[list[float]]:
    return [[float(f"{error:.{DIGITS}g}") for error in heads] for heads in layers]


def pair_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Errors averaged over layers and heads, as in KVTuner's table 9, with perplexity, as in its table 2."""
    lines = []
    for row in rows:
        errors = [
            f"{np.mean(row[name]):.2e}" if name == "e_a" else f"{np.mean(row[name]):.4f}"
            for name in ERRORS
            if name in row
        ]
        cells = errors or [""] * len(ERRORS)
        lines.append([row["cache"], *cells, f"{row['kld']:.4f}", f"{np.exp(row['nll']):.2f}"])
    return lines


KEYS_HEADER = (
    *("mode", "bits", "e_o, keys", "e_o, values", "keys cost more in"),
    *("keys' e_a, rank", "keys' e_o, rank", "values' e_o, rank", "worst heads for keys"),
)


def key_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Keys alone in a width against values alone in it, head by head (named layer.head).

    The ranks are Spearman's correlations over heads with the largest attention weight: lemma 1 expects them below 0.
    """
    at = {row["cache"]: row for row in rows}
    weights, lines = np.array(at["dense"]["largest_weight"]), []
    for mode in MODES:
        for bits, names in ALONE.items():
            if not all(f"{name}@{mode}" in at for name in names):
                continue
            of_keys, of_values = (at[f"{name}@{mode}"] for name in names)
            keys, values = np.array(of_keys["e_o"]), np.array(of_values["e_o"])
            ranks = (spearmanr(weights, e, axis=None).statistic for e in (of_keys["e_a"], keys, values))
            worst = np.argsort(-keys, axis=None)[:5]
            named = ", ".join("{}.{}".format(*np.unravel_index(i, keys.shape)) for i in worst)
            means = f"{keys.mean():.3f}", f"{values.mean():.3f}", f"{(keys > values).mean():.0%} of heads"
            lines.append([mode, str(bits), *means, *(f"{rank:.2f}" for rank in ranks), named])
    return lines


def draw(rows: Sequence[Row]) -> Figure:
    """e_o by layer and head, of keys alone in both modes and of values alone; and e_o over the largest weight."""
    at = {row["cache"]: row for row in rows}
    errors = {name: np.array(at[name]["e_o"]) for name in SHOWN}
    limits = {"vmin": min(e.min() for e in errors.values()), "vmax": max(e.max() for e in errors.values())}
    figure, (axes,) = style.subplots(1, len(SHOWN) + 1, (4 * (len(SHOWN) + 1), 4.4))
    for axis, name in zip(axes, SHOWN, strict=False):
        layers, heads = errors[name].shape
        centres = np.arange(layers), np.arange(heads)
        axis.grid(False)
        mesh = axis.pcolormesh(
            *centres, errors[name].T, norm="log", cmap=style.color_map(), edgecolors="white", linewidth=0.3, **limits
        )
        axis.set(xlabel="layer", ylabel="query head")
        axis.set_title(name, fontsize=style.TITLE)
    bar = figure.colorbar(mesh, ax=list(axes[:-1]), location="bottom", aspect=60)
    bar.set_label("e_o, the relative error of the attention output", fontsize=style.PLAIN)
    bar.ax.tick_params(labelsize=style.SMALL)
    weights = np.array(at["dense"]["largest_weight"])
    for name, mark in zip(SHOWN, style.MARKS, strict=False):
        axes[-1].plot(weights.ravel(), errors[name].ravel(), mark, ms=3, alpha=0.5, label=name)
    axes[-1].set(xlabel="largest attention weight, averaged over queries", ylabel="e_o of a head", yscale="log")
    spacing = {"ncols": len(SHOWN), "columnspacing": 1, "handletextpad": 0.1}
    axes[-1].legend(fontsize=style.SMALL, loc="lower center", bbox_to_anchor=(0.5, 1), **spacing)
    style.title(figure, f"{style.describe(rows[0])}: keys alone in 4 bits (k4v8) and values alone (k8v4)")
    return figure


if __name__ == "__main__":
    program.run(main, "configs/head_errors.py")
