"""The picture of a sweep: what a cache costs in bits against what it costs in quality."""

from __future__ import annotations

import io
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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
FLOOR = 1e-4  # what a logarithmic axis shows of nothing


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Two panels, nll increase and KL divergence, over bits per cached element; one labelled point a plan."""
    dense = next((row for row in rows if row["cache"] == "dense" and "error" not in row), None)
    points = [row for row in rows if row["cache"] != "dense" and "error" not in row]
    panels: list[tuple[str, Any]] = [("KL divergence from the dense run (nats per token)", lambda row: row["kld"])]
    if dense:
        panels.insert(0, ("increase in nll over dense (nats per token)", lambda row: row["nll"] - dense["nll"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.8), squeeze=False, layout="constrained")
    for axis, (label, value) in zip(axes[0], panels, strict=True):
        for row in points:
            x, y = row["bits_asymptotic"], max(value(row), FLOOR)
            axis.plot(x, y, "o", color=_color(row["cache"]))
            name = row["cache"] if len(row["cache"]) <= 32 else row["cache"][:31] + "…"
            axis.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set(yscale="log", xlabel="bits per cached element, scales included (dense: 16)", ylabel=label)
        axis.margins(x=0.24, y=0.12)
        axis.grid(alpha=0.3, which="both")
    shown = {_color(row["cache"]) for row in points}
    for method, color in COLORS.items():
        if color in shown:
            axes[0][0].plot([], [], "o", color=color, label=method)
    axes[0][0].legend(loc="upper right")
    if rows:
        title = "{model}, {text}, {windows} windows of {context} tokens, {protocol}; lower left is better"
        figure.suptitle(title.format(**rows[0]), fontsize=10)
    save_figure(figure, file)


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
