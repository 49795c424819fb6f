"""The picture of studies that follow KL divergence along layers or positions: a line a cache."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvjax.experiments import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def draw(curves: Mapping[str, tuple[Sequence[float], Sequence[Row]]], along: str) -> Figure:
    """Draws KL divergence, the `kld` of rows.

    Args:
      curves: by the cache, where each of its rows stands, and the rows.
      along: what the places are.
    """
    figure, ((axis,),) = style.subplots()
    names, shared = style.short_names(list(curves))
    for name, mark, (places, rows) in zip(names, itertools.cycle(style.MARKS), curves.values(), strict=False):
        kld, errors = ([row[key] for row in rows] for key in ("kld", "kld_se"))
        axis.errorbar(places, kld, errors, fmt=f"{mark}-", ms=4, lw=1, capsize=2, label=name + shared)
    first = next(iter(curves.values()))[1][0]
    axis.set(xlabel=along, ylabel=style.KL, yscale="log")
    style.title(figure, f"{style.describe(first)}; bars: one standard error")
    style.legend(figure, axis)
    return figure
