"""The picture of a sweep: what stands where, of ordinary and of hostile rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.axes import Axes

from kvjax.experiments import pareto, style

DENSE = {"model": "m", "text": "t", "windows": 2, "context": 8, "protocol": "parallel", "cache": "dense", "nll": 3.0}


def row(cache: str, kld: float, nll: float, **more: float) -> dict[str, Any]:
    return {**DENSE, "cache": cache, "bits_asymptotic": 4.0, "kld": kld, "nll": nll, **more}


def drawn(rows: list[dict[str, Any]]) -> list[Axes]:
    """The picture's panels; it can also be written."""
    figure = pareto.draw(rows)
    assert len(style.png(figure)) > 5_000
    return figure.axes


def open_markers(axis: Axes) -> list[float]:
    return [float(line.get_ydata()[0]) for line in axis.lines if line.get_fillstyle() == "none"]


def labels(axis: Axes) -> set[str]:
    return {text.get_text() for text in axis.texts}


def test_kl_comes_first_and_bars_are_the_rows_errors() -> None:
    rows = [DENSE, row("k4v4@kivi", 0.02, 3.1, kld_se=0.01, nll_increase_se=0.05)]
    kl, nll = drawn(rows)
    assert kl.get_ylabel().startswith("KL") and nll.get_ylabel().startswith("increase in nll")
    for axis, ends in ((kl, (0.01, 0.03)), (nll, (0.05, 0.15))):
        (bar,) = axis.collections
        assert bar.get_segments()[0][:, 1] == pytest.approx(ends)
        assert not open_markers(axis) and "not above dense" not in labels(axis)


def test_what_has_no_place_on_a_logarithmic_axis_is_marked() -> None:
    rows = [DENSE, row("below", 0.5, 2.9), row("equal", 0.4, 3.0), row("above", 0.3, 3.2), row("inf", math.inf, 1e9)]
    rows += [row("nan", math.nan, math.nan), {"cache": "failed", "error": "out of memory"}]
    kl, nll = drawn(rows)
    assert open_markers(kl) == [1 - pareto.EDGE] * 2 and "not finite" in labels(kl)
    assert "not above dense" not in labels(kl)
    assert sorted(open_markers(nll)) == [pareto.EDGE] * 2 + [1 - pareto.EDGE]
    assert {"not above dense", "not finite", "below", "equal", "nan"} <= labels(nll)
    assert nll.get_ylim()[0] < 0.2 < 1e9 < nll.get_ylim()[1]


@pytest.mark.parametrize(
    "rows",
    [[], [DENSE], [row("k2v2@kivi", 0.1, 3.0)], [DENSE, row("0:k8v8@token;" * 20, 0.0, 2.0)]],
    ids=["no rows", "dense alone", "no dense run", "a long name below dense"],
)
def test_few_rows_are_drawn(rows: list[dict[str, Any]]) -> None:
    assert len(drawn(rows)) == 1 + (DENSE in rows)
