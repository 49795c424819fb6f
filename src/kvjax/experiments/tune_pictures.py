"""The pictures of a tuning run: what each layer's candidates cost, how the layers group, and the plans found."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from kvjax.experiments import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERRORS = {
    "kld": "KL of the model with this layer quantised alone (nats per token)",
    "predicted": "its prediction from one backward pass (nats per token)",
    "e_k": "relative error of the keys e_k (of norms)",
    "e_v": "relative error of the values e_v (of norms)",
    "e_a": "error of the attention weights e_a",
    "e_o": "relative error of the attention output e_o (of norms)",
}
KINDS = ("search", "uniform", "chosen")


def heat_map(rows: Sequence[dict[str, Any]], error: str) -> Figure:
    """One error of every candidate in every layer, on a log colour scale; hatched where it was not measured.

    The candidates have their bits beside their names.
    """
    layers, candidates, values = grid(rows, error)
    bits = _bits(rows)
    names, shared = style.short_names(candidates)
    width, height = max(6.4, 2.2 + 0.17 * len(layers)), 2.0 + 0.2 * len(candidates)
    figure, ((axis,),) = style.subplots(1, 1, (width, height))
    positive = values[values > 0]
    limits = (positive.min(), positive.max()) if positive.size else (0.1, 1)
    colors = style.color_map().with_extremes(under="black")
    look: dict[str, Any] = {"cmap": colors, "edgecolors": "white", "linewidth": 0.5}
    axis.grid(False)
    mesh = axis.pcolormesh(floored(values), norm="log", clim=limits, **look)
    axis.patch.set(facecolor="0.96", edgecolor="0.8", hatch="////", linewidth=0)
    step = math.ceil(len(layers) / 40)
    axis.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]])
    labels = [f"{name}  {bits[cache]:5.2f}" for name, cache in zip(names, candidates, strict=True)]
    axis.set_yticks(np.arange(len(candidates)) + 0.5, labels)
    axis.set(xlabel="layer", ylabel=f"candidate{shared}, its bits")
    extend, note = ("min", "; black: 0") if (values <= 0).any() else ("neither", "")
    scale: dict[str, Any] = {"location": "top", "aspect": 6 * width, "pad": 0.1 / height}  # as thick in any figure
    bar = figure.colorbar(mesh, extend=extend, **scale)
    bar.set_label(ERRORS[error] + note, fontsize=style.PLAIN)
    bar.ax.tick_params(labelsize=style.SMALL)
    style.title(figure, style.describe(rows[0]))
    return figure


def clusters(rows: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> Figure:
    """A panel per group: e_o of its layers over its candidates, one line a layer."""
    layers, candidates, values = grid(rows, "e_o")
    names, shared = style.short_names(candidates)
    values = floored(values)
    across = min(4, math.ceil(math.sqrt(len(groups))))
    down = math.ceil(len(groups) / across)
    figure, axes = style.subplots(down, across, (max(6.4, 3.1 * across), 1.0 + 2.6 * down), sharey=True)
    depth = style.scale(layers[0], layers[-1])
    for axis, group in zip(axes.flat, groups, strict=False):
        chosen = [i for i, candidate in enumerate(candidates) if candidate in group["candidates"]]
        for layer in group["layers"]:
            axis.plot(values[chosen, layers.index(layer)], "o-", ms=3.5, lw=1.2, color=depth.to_rgba(layer))
        axis.set_xticks(range(len(chosen)), [names[i] for i in chosen], rotation=90)
        axis.set(yscale="log", xlim=(-0.4, max(len(chosen), 2) - 0.6))
        axis.set_title(_title_of(group["layers"]), fontsize=style.PLAIN)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel(f"candidates{shared} kept for the group, by bits", fontsize=style.PLAIN)
    figure.supylabel(ERRORS["e_o"], fontsize=style.PLAIN)
    bar = figure.colorbar(depth, ax=axes, aspect=40, ticks=sorted({layers[0], layers[len(layers) // 2], layers[-1]}))
    bar.set_label("layer", fontsize=style.PLAIN)
    bar.ax.tick_params(labelsize=style.SMALL)
    style.title(figure, style.describe(rows[0]))
    return figure


def front(rows: Sequence[dict[str, Any]]) -> Figure:
    """KL over bits: the uniform caches, the searched plans with those that no other beats, and the chosen plan."""
    figure, ((axis,),) = style.subplots(1, 1, (8, 5.8))
    bits = np.array([row["bits_asymptotic"] for row in rows])
    kld, predicted = floored([[row["kld"] for row in rows], [row.get("predicted") for row in rows]])
    search, uniform, chosen = ([i for i, row in enumerate(rows) if row["kind"] == kind] for kind in KINDS)
    if search:
        _draw_search(axis, bits[search], kld[search], predicted[search])
    names, shared = style.short_names([rows[i]["cache"] for i in uniform])
    if uniform:
        squares: dict[str, Any] = {"color": style.VERMILION, "marker": "s", "zorder": 4}
        axis.scatter(bits[uniform], kld[uniform], 36, label=f"uniform{shared}", **squares)
    for i in chosen:
        label = "chosen: {bits_asymptotic:.2f} bits ({bits_nominal:.2f} without scales), KL {kld:.2g}"
        star: dict[str, Any] = {"marker": "*", "color": style.YELLOW, "edgecolor": "black", "zorder": 5}
        axis.scatter(bits[i], kld[i], 260, label=label.format(**rows[i]), **star)
    axis.set(yscale="log", xlabel=style.BITS, ylabel=style.KL)
    axis.margins(x=0.09, y=0.09)
    searched = " and ".join(dict.fromkeys(str(row["method"]) for row in rows))
    style.title(figure, f"{style.describe(rows[0])}, {searched}; lower left is better")
    style.legend(figure, axis)
    names = [f"{name} (KL 0)" if rows[i]["kld"] <= 0 else name for i, name in zip(uniform, names, strict=True)]
    style.name_points(axis, list(zip(bits[uniform], kld[uniform], strict=True)), names)
    return figure


def grid(rows: Sequence[dict[str, Any]], error: str) -> tuple[list[int], list[str], Float[np.ndarray, "C L"]]:
    """The layers in order, the candidates by bits then name, and the error of each; nan where rows lack it."""
    bits = _bits(rows)
    layers, candidates = sorted({row["layer"] for row in rows}), sorted(bits, key=lambda cache: (bits[cache], cache))
    found = {(row["cache"], row["layer"]): row.get(error) for row in rows}
    values = [[found.get((candidate, layer)) for layer in layers] for candidate in candidates]
    return layers, candidates, np.array(values, float)


def floored(values: Any) -> Float[np.ndarray, "..."]:
    """For a log scale: what is not positive becomes half of the least that is; None becomes nan."""
    array = np.array(values, float)
    return np.where(array <= 0, array[array > 0].min(initial=1) / 2, array)


def undominated(bits: Float[np.ndarray, "n"], kld: Float[np.ndarray, "n"]) -> list[int]:
    """Those that no other has both fewer bits and less KL than, by bits; of equals the first."""
    kept: list[int] = []
    for i in sorted(range(len(bits)), key=lambda i: (bits[i], kld[i])):
        if np.isfinite(kld[i]) and (not kept or kld[i] < kld[kept[-1]]):
            kept.append(i)
    return kept


def layers_text(layers: Iterable[int]) -> str:
    """As a plan writes them: 0-2+29."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "+".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _draw_search(axis: Axes, bits: np.ndarray, kld: np.ndarray, predicted: np.ndarray) -> None:
    foretold = [i for i in np.argsort(bits) if np.isfinite(predicted[i])]
    if foretold:
        axis.plot(
            bits[foretold], predicted[foretold], "--", color=style.GRAY, lw=1, label="predicted KL of the search"
        )
    best = undominated(bits, kld)
    axis.plot(np.repeat(bits[best], 2)[1:], np.repeat(kld[best], 2)[:-1], color=style.BLUE, lw=1.2)
    axis.scatter(bits, kld, 14, color=style.BLUE, alpha=0.3, label="searched")
    axis.scatter(bits[best], kld[best], 32, color=style.BLUE, label="searched, on the front", zorder=3)


def _bits(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {row["cache"]: row["bits_asymptotic"] for row in rows}


def _title_of(layers: Sequence[int]) -> str:
    """The layers in lines that fit a panel, broken at the +."""
    lines = textwrap.wrap(layers_text(layers).replace("+", "+ "), 32)
    return ("layers " if len(layers) > 1 else "layer ") + "\n".join(line.replace(" ", "") for line in lines)
