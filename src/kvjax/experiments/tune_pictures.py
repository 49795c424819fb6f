"""The pictures of a tuning run: what each layer's candidates cost, how the layers group, and the plans found."""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from kvjax.experiments.pareto import save_figure

ERRORS = {
    "kld": "KL of the model with this layer quantised alone (nats per token)",
    "predicted": "its prediction from one backward pass (nats per token)",
    "e_k": "relative error of the keys e_k (of norms)",
    "e_v": "relative error of the values e_v (of norms)",
    "e_a": "error of the attention weights e_a",
    "e_o": "relative error of the attention output e_o (of norms)",
}
KINDS = ("search", "uniform", "chosen")
SEARCH, UNIFORM, CHOSEN = "#0072B2", "#D55E00", "#F0E442"  # of Okabe and Ito's colours, told apart by all
DPI = 130
LONG = 24  # characters of a name
SIDES = [(x, y) for y in (1, 0, -1, 2, -2, 3, -3, 4, -4) for x in (1, -1, 0) if x or y]  # of a point, best first


def heat_map(rows: Sequence[dict[str, Any]], error: str, file: Path) -> None:
    """One error of every candidate in every layer, on a log colour scale; hatched where it was not measured.

    The candidates have their bits beside their names.
    """
    layers, candidates, values = grid(rows, error)
    bits = _bits(rows)
    names, shared = short_names(candidates)
    width, height = max(6.4, 2.2 + 0.17 * len(layers)), 1.7 + 0.2 * len(candidates)
    figure, axis = plt.subplots(figsize=(width, height), dpi=DPI, layout="constrained")
    positive = values[values > 0]
    limits = (positive.min(), positive.max()) if positive.size else (0.1, 1)
    colors = plt.get_cmap("viridis").with_extremes(under="black")
    mesh = axis.pcolormesh(floored(values), norm=LogNorm(*limits), cmap=colors, edgecolors="white", linewidth=0.5)
    axis.patch.set(facecolor="0.96", edgecolor="0.8", hatch="////", linewidth=0)
    step = math.ceil(len(layers) / 40)
    axis.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]], fontsize=8)
    labels = [f"{name}  {bits[cache]:5.2f}" for name, cache in zip(names, candidates, strict=True)]
    axis.set_yticks(np.arange(len(candidates)) + 0.5, labels, fontsize=8)
    axis.set(xlabel="layer", ylabel=f"candidate{shared}, its bits")
    extend, note = ("min", "; black: 0") if (values <= 0).any() else ("neither", "")
    scale: dict[str, Any] = {"location": "top", "aspect": 6 * width, "pad": 0.1 / height}  # as thick in any figure
    figure.colorbar(mesh, label=ERRORS[error] + note, extend=extend, **scale)
    save_figure(figure, file)


def clusters(rows: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], file: Path) -> None:
    """A panel per group: e_o of its layers over its candidates, one line a layer."""
    layers, candidates, values = grid(rows, "e_o")
    names, shared = short_names(candidates)
    values = floored(values)
    across = min(4, math.ceil(math.sqrt(len(groups))))
    down = math.ceil(len(groups) / across)
    size = max(6.4, 3.1 * across), 0.8 + 2.5 * down
    figure, axes = plt.subplots(down, across, figsize=size, dpi=DPI, sharey=True, squeeze=False, layout="constrained")
    shades = LinearSegmentedColormap.from_list("depth", plt.get_cmap("viridis")(np.linspace(0, 0.9, 64)))
    depth = ScalarMappable(Normalize(layers[0], layers[-1]), shades)
    for axis, group in zip(axes.flat, groups, strict=False):
        chosen = [i for i, candidate in enumerate(candidates) if candidate in group["candidates"]]
        for layer in group["layers"]:
            axis.plot(values[chosen, layers.index(layer)], "o-", ms=3.5, lw=1.2, color=depth.to_rgba(layer))
        axis.set_xticks(range(len(chosen)), [names[i] for i in chosen], rotation=45, ha="right", fontsize=8)
        axis.set(yscale="log", xlim=(-0.4, max(len(chosen), 2) - 0.6))
        axis.set_title(_title_of(group["layers"]), fontsize=8.5)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel(f"candidates{shared} kept for the group, by bits", fontsize=10)
    figure.supylabel(ERRORS["e_o"], fontsize=10)
    figure.colorbar(depth, ax=axes, label="layer", aspect=40, ticks=MaxNLocator(integer=True))
    save_figure(figure, file)


def front(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """KL over bits: the uniform caches, the searched plans with those that no other beats, and the chosen plan."""
    figure, axis = plt.subplots(figsize=(8, 5.4), dpi=DPI, layout="constrained")
    bits = np.array([row["bits_asymptotic"] for row in rows])
    kld, predicted = floored([[row["kld"] for row in rows], [row.get("predicted") for row in rows]])
    search, uniform, chosen = ([i for i, row in enumerate(rows) if row["kind"] == kind] for kind in KINDS)
    if search:
        _draw_search(axis, bits[search], kld[search], predicted[search])
    names, shared = short_names([rows[i]["cache"] for i in uniform])
    if uniform:
        axis.scatter(bits[uniform], kld[uniform], 36, color=UNIFORM, marker="s", label=f"uniform{shared}", zorder=4)
    for i in chosen:
        label = "chosen: {bits_asymptotic:.2f} bits ({bits_nominal:.2f} without scales), KL {kld:.2g}"
        star: dict[str, Any] = {"marker": "*", "color": CHOSEN, "edgecolor": "black", "zorder": 5}
        axis.scatter(bits[i], kld[i], 260, label=label.format(**rows[i]), **star)
    x_label = "bits per cached element, scales included (dense: 16)"
    axis.set(yscale="log", xlabel=x_label, ylabel="KL divergence from the dense run (nats per token)")
    axis.margins(x=0.09, y=0.09)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="upper right", fontsize=8.5)
    what = (" and ".join(dict.fromkeys(str(row[key]) for row in rows)) for key in ("model", "text", "method"))
    axis.set_title(", ".join(what) + "; lower left is better", fontsize=10)
    names = [name if len(name) <= 32 else name[:31] + "…" for name in names]
    names = [f"{name} (KL 0)" if rows[i]["kld"] <= 0 else name for i, name in zip(uniform, names, strict=True)]
    _name_points(axis, list(zip(bits[uniform], kld[uniform], strict=True)), names)
    save_figure(figure, file)


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


def short_names(caches: Sequence[str]) -> tuple[list[str], str]:
    """The caches' names without the mode that all of them share, and that mode as it stands behind a word.

    Long ones also without their fields, where they can be told apart without.
    """
    plain = [re.sub(r"^([^;(]*)\([^()]*\)([^;]*)$", r"\1(…)\2", cache) for cache in caches]
    if max(map(len, caches), default=0) > LONG and len({*plain}) == len({*caches}):
        caches = plain
    modes = {"".join(cache.partition("@")[1:]) for cache in caches}
    shared = modes.pop() if len(modes) == 1 else ""
    return [cache.removesuffix(shared) for cache in caches], shared and f" {shared}"


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
        axis.plot(bits[foretold], predicted[foretold], "--", color="0.55", lw=1, label="predicted KL of the search")
    best = undominated(bits, kld)
    axis.plot(np.repeat(bits[best], 2)[1:], np.repeat(kld[best], 2)[:-1], color=SEARCH, lw=1.2)
    axis.scatter(bits, kld, 14, color=SEARCH, alpha=0.3, label="searched")
    axis.scatter(bits[best], kld[best], 32, color=SEARCH, label="searched, on the front", zorder=3)


def _bits(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {row["cache"]: row["bits_asymptotic"] for row in rows}


def _title_of(layers: Sequence[int]) -> str:
    """The layers in lines that fit a panel, broken at the +."""
    lines = textwrap.wrap(layers_text(layers).replace("+", "+ "), 32)
    return ("layers " if len(layers) > 1 else "layer ") + "\n".join(line.replace(" ", "") for line in lines)


def _name_points(axis: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Each name beside its point, where it covers least of what is drawn; a thin line leads to one farther off."""
    figure: Any = axis.figure
    figure.draw_without_rendering()
    lines = [line.get_path().transformed(line.get_transform()).interpolated(20).vertices for line in axis.lines]
    dots = np.concatenate([np.empty((0, 2)), *lines])
    taken = [legend.get_window_extent() for legend in [axis.get_legend()] if legend]
    marks: Any
    for marks in axis.collections:
        reach = marks.get_sizes()[0] ** 0.5 / 2 * DPI / 72
        centres = axis.transData.transform(marks.get_offsets())
        taken += [Bbox.from_bounds(x, y, 0, 0).padded(reach) for x, y in centres]

    def place(note: Annotation, side: tuple[int, int]) -> Bbox:
        ha, va = ("center", "left", "right")[side[0]], ("center", "bottom", "top")[np.sign(side[1])]
        note.set(position=(6 * side[0], 5 * side[1]), ha=ha, va=va)
        note.update_positions(figure.canvas.get_renderer())
        return Text.get_window_extent(note)  # an annotation's own takes in the line

    def covered(note: Annotation, side: tuple[int, int]) -> int:
        box = place(note, side)
        outside = not (axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max))
        crossed = box.padded(3).count_contains(dots)
        return 1000 * outside + 50 * box.count_overlaps(taken) + crossed + 2 * abs(side[1])

    for point, name in zip(points, names, strict=True):
        leader = {"arrowstyle": "-", "lw": 0.5, "color": "0.4", "shrinkA": 0, "shrinkB": 3}
        note = axis.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8, arrowprops=leader)
        taken.append(place(note, min(SIDES, key=functools.partial(covered, note))))
