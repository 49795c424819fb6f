"""The picture of a sweep: what a cache costs in bits against what it costs in quality."""

from __future__ import annotations

import io
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvjax.files import write_atomically

COLORS = {
    "k*v*@token": "tab:orange",
    "k*v*@kivi": "tab:blue",
    "xcl*": "tab:green",
    "x*@input": "tab:brown",
    "x*@latent": "tab:red",
    "x*@head": "tab:purple",
}
MIXED = "tab:gray"
EDGE = 0.06  # where the lines beside the logarithmic axis stand, as a share of its height
Row = dict[str, Any]
Point = tuple[Row, float, float]  # what it costs in quality, and the standard error of that (NaN: not known)


def draw(rows: list[Row], file: Path) -> None:
    """Two panels, KL divergence and nll increase, over bits per cached element; one labelled point a plan."""
    dense = next((row for row in rows if row["cache"] == "dense" and "error" not in row), None)
    measured = [row for row in rows if row["cache"] != "dense" and "error" not in row]
    panels = [
        (
            "KL divergence from the dense run (nats per token)",
            [(row, row["kld"], row.get("kld_se", math.nan)) for row in measured],
        )
    ]
    if dense:
        increase = [(row, row["nll"] - dense["nll"], row.get("nll_increase_se", math.nan)) for row in measured]
        panels.append(("increase in nll over dense (nats per token)", increase))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.8), squeeze=False, layout="constrained")
    for axis, (label, points) in zip(axes[0], panels, strict=True):
        _draw_points(axis, points)
        axis.set(xlabel="bits per cached element, scales included (dense: 16)", ylabel=label)
    shown = {_color(row["cache"]) for row in measured}
    for method, color in COLORS.items():
        if color in shown:
            axes[0][0].plot([], [], "o", color=color, label=method)
    if shown & {*COLORS.values()}:
        axes[0][0].legend(loc="upper right", fontsize=8)
    if rows:
        title = "{model}, {text}, {windows} windows of {context} tokens, {protocol}; lower left is better"
        bars = any(math.isfinite(error) for _, points in panels for *_, error in points)
        figure.suptitle(title.format(**rows[0]) + "; bars: one standard error" * bars, fontsize=10)
    save_figure(figure, file)


def _draw_points(axis: Axes, points: list[Point]) -> None:
    """Points on a logarithmic axis, and open markers on lines of their own for what has no place on it.

    What is not above the dense run stands at the bottom, what is not finite at the top: neither may look like a
    measured extreme, nor be left out.
    """
    placed = [(y, error) for _, y, error in points if 0 < y < math.inf]
    axis.set(yscale="log", ylim=_limits(placed))
    axis.margins(x=0.24)
    axis.grid(alpha=0.3, which="both")
    beside = axis.get_xaxis_transform()  # y as a share of the axis
    for row, y, error in points:
        x, color = row["bits_asymptotic"], _color(row["cache"])
        if 0 < y < math.inf:
            axis.errorbar(
                x, y, error if math.isfinite(error) else None, fmt="o", color=color, elinewidth=1, capsize=2
            )
            placing: dict[str, Any] = {"xytext": (5, 4)}
        else:
            y, up = (EDGE, 1) if y <= 0 else (1 - EDGE, -1)
            placing = {
                "xycoords": beside,
                "xytext": (3, 4 * up),
                "rotation": 25 * up,
                "va": ("top", "bottom")[up > 0],
            }
            axis.plot(x, y, "o", color=color, fillstyle="none", transform=beside)
        name = row["cache"] if len(row["cache"]) <= 32 else row["cache"][:31] + "…"
        axis.annotate(name, (x, y), textcoords="offset points", fontsize=8, **placing)
    for height, label, outside in (
        (EDGE, "not above dense", [y for _, y, _ in points if y <= 0]),
        (1 - EDGE, "not finite", [y for _, y, _ in points if not y < math.inf]),
    ):
        if outside:
            axis.plot([0, 1], [height] * 2, ":", color="tab:gray", lw=1, transform=axis.transAxes, zorder=0)
            axis.text(0.01, height - 0.01, label, transform=axis.transAxes, va="top", color="tab:gray", fontsize=8)


def _limits(placed: list[tuple[float, float]]) -> tuple[float, float]:
    """The axis of these values above 0 and their errors, with room for the lines beside it."""
    if not placed:
        return 0.1, 1.0
    low = math.log10(min(y for y, _ in placed))
    high = math.log10(max(y + (error if math.isfinite(error) else 0) for y, error in placed))
    room = 0.2 * max(high - low, 1)
    return 10 ** (low - room), 10 ** (high + room)


def save_figure(figure: Figure, file: Path) -> None:
    """Writes the picture and closes it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)
    write_atomically(file, picture.getvalue())


def _color(cache: str) -> str:
    """Of the method that all layers share."""
    specs = [part.rpartition(":")[2] for part in cache.split(";")]
    fits = (color for pattern, color in COLORS.items() if all(fnmatch(spec, f"{pattern}*") for spec in specs))
    return next(fits, MIXED)
