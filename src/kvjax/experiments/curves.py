"""The picture of studies that follow KL divergence along layers or positions: a line a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from kvjax.experiments.pareto import save_figure

Row = dict[str, Any]
TITLE = "{model}, {text}, {windows} windows of {context} tokens, {protocol}; bars: one standard error"


def draw(curves: Mapping[str, tuple[Sequence[float], Sequence[Row]]], along: str, file: Path) -> None:
    """Draws KL divergence, the `kld` of rows.

    Args:
      curves: by the cache, where each of its rows stands, and the rows.
      along: what the places are.
      file: the picture's.
    """
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, (places, rows) in curves.items():
        kld, errors = ([row[key] for row in rows] for key in ("kld", "kld_se"))
        axis.errorbar(places, kld, errors, fmt="o-", ms=3, lw=1, capsize=2, label=name)
    first = next(iter(curves.values()))[1][0]
    axis.set(xlabel=along, ylabel="KL divergence (nats per token)", yscale="log")
    axis.set_title(TITLE.format(**first), fontsize=9)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_figure(figure, file)
