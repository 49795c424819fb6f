"""The picture of a sweep: what a cache costs in bits against what it costs in quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from kvjax.experiments import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {  # of the method that all layers share: colour and marker
    "k*v*@token": (style.VERMILION, "s"),
    "k*v*@kivi": (style.BLUE, "o"),
    "xcl*": (style.GREEN, "D"),
    "x*@input": (style.ORANGE, "^"),
    "x*@latent": (style.PURPLE, "v"),
    "x*@head": (style.SKY, "P"),
}
OTHER = "another method, or several"
EDGE = 0.06  # where the lines beside the logarithmic axis stand, as a share of its height
NAMED = 24  # points: of more, only those that no other beats have names
Row = dict[str, Any]
Point = tuple[Row, float, float]  # what it costs in quality, and the standard error of that (NaN: not known)


def draw(rows: Sequence[Row]) -> Figure:
    """Two panels, KL divergence and nll increase, over bits per cached element; one labelled point a plan."""
    dense = next((row for row in rows if row["cache"] == "dense" and "error" not in row), None)
    measured = [row for row in rows if row["cache"] != "dense" and "error" not in row]
    panels = [(style.KL, [(row, row["kld"], row.get("kld_se", math.nan)) for row in measured])]
    if dense:
        increase = [(row, row["nll"] - dense["nll"], row.get("nll_increase_se", math.nan)) for row in measured]
        panels.append(("increase in nll over the dense run (nats per token)", increase))
    figure, axes = style.subplots(1, len(panels), (6.2 * len(panels), 5.0))
    for axis, (label, points) in zip(axes[0], panels, strict=True):
        _draw_points(axis, points)
        axis.set(xlabel=style.BITS, ylabel=label)
    if rows:
        bars = any(math.isfinite(error) for _, points in panels for *_, error in points)
        said = f"{style.describe(rows[0])}; lower left is better" + "; bars: one standard error" * bars
        style.title(figure, said + "; named: what no other beats" * (len(measured) > NAMED))
    style.legend(figure, axes[0][0])
    for axis, (_, points) in zip(axes[0], panels, strict=True):
        _name(axis, points)
    return figure


def _draw_points(axis: Axes, points: list[Point]) -> None:
    """Points on a logarithmic axis, and open markers on lines of their own for what has no place on it.

    What is not above the dense run stands at the bottom, what is not finite at the top: neither may look like a
    measured extreme, nor be left out.
    """
    placed = [(y, error) for _, y, error in points if 0 < y < math.inf]
    axis.set(yscale="log", ylim=_limits(placed))
    axis.margins(x=0.16)
    beside = axis.get_xaxis_transform()  # y as a share of the axis
    for row, y, error in points:
        x, (color, mark) = row["bits_asymptotic"], _look(row["cache"])[1]
        if 0 < y < math.inf:
            bar = error if math.isfinite(error) else None
            axis.errorbar(x, y, bar, fmt=mark, ms=6, color=color, elinewidth=1, capsize=2)
        else:
            axis.plot(x, _beside(y), mark, ms=6, color=color, fillstyle="none", transform=beside)
    for height, label, outside in (
        (EDGE, "not above dense", [y for _, y, _ in points if y <= 0]),
        (1 - EDGE, "not finite", [y for _, y, _ in points if not y < math.inf]),
    ):
        if outside:
            axis.plot([0, 1], [height] * 2, ":", color=style.GRAY, lw=1, transform=axis.transAxes, zorder=0)
            where: dict[str, Any] = {"transform": axis.transAxes, "va": "top", "color": style.GRAY}
            axis.text(0.01, height - 0.01, label, fontsize=style.SMALL, **where)
    for method, (color, mark) in dict.fromkeys(_look(row["cache"]) for row, *_ in points):
        axis.plot([], [], mark, color=color, label=method)


def _name(axis: Axes, points: list[Point]) -> None:
    """Short names beside the points."""
    inside = axis.transAxes + axis.transData.inverted()
    places = [
        (row["bits_asymptotic"], y if 0 < y < math.inf else inside.transform((0, _beside(y)))[1])
        for row, y, _ in points
    ]
    shown = range(len(points)) if len(points) <= NAMED else _unbeaten(points)
    names = [style.short_name(row["cache"]) for row, *_ in points]
    style.name_points(axis, [places[i] for i in shown], [names[i] for i in shown])


def _unbeaten(points: list[Point]) -> list[int]:
    """Those that no other has both fewer bits and a lower cost than."""
    at = [(row["bits_asymptotic"], y) for row, y, _ in points]
    beaten = lambda x, y: any(a <= x and b <= y and (a, b) != (x, y) for a, b in at)  # noqa: E731
    return [i for i, (x, y) in enumerate(at) if math.isfinite(y) and not beaten(x, y)]


def _beside(y: float) -> float:
    """The height of what has no place on a logarithmic axis, as a share of it."""
    return EDGE if y <= 0 else 1 - EDGE


def _limits(placed: list[tuple[float, float]]) -> tuple[float, float]:
    """The axis of these values above 0 and their errors, with room for the lines beside it."""
    if not placed:
        return 0.1, 1.0
    low = math.log10(min(y for y, _ in placed))
    high = math.log10(max(y + (error if math.isfinite(error) else 0) for y, error in placed))
    room = 0.2 * max(high - low, 1)
    return 10 ** (low - room), 10 ** (high + room)


def _look(cache: str) -> tuple[str, tuple[str, str]]:
    """The method that all layers share, with its colour and marker."""
    specs = [part.rpartition(":")[2] for part in cache.split(";")]
    fits = (each for each in LOOKS.items() if all(fnmatch(spec, f"{each[0]}*") for spec in specs))
    return next(fits, (OTHER, (style.GRAY, "X")))
