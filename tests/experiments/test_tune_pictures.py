"""The pictures of a tuning run: what stands where in them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvjax.experiments import tune_pictures as pictures

WIDTHS = (2, 4, 8)


def measured(layers: list[int], mode: str = "kivi") -> list[dict[str, Any]]:
    """Rows as a tuning run has them, in no order."""
    rows = []
    for layer in reversed(layers):
        for key in WIDTHS:
            for value in WIDTHS:
                e_o = 0.3 * (2.0**-key + 2.0**-value) * (1 + layer % 5)
                errors = {"e_k": 2.0**-key, "e_v": 2.0**-value, "e_a": 4.0**-key, "e_o": e_o, "predicted": e_o**2}
                bits = (key + value) / 2 + 1
                rows.append({"layer": layer, "cache": f"k{key}v{value}@{mode}", "bits_asymptotic": bits, **errors})
    return rows


def plan(kind: str, cache: str, bits: float, kld: float, predicted: float | None = None) -> dict[str, Any]:
    about = {"model": "qwen3", "text": "wikitext2", "method": "kivi"}
    sizes = {"bits_nominal": bits - 1, "bits_asymptotic": bits}
    return {"kind": kind, "cache": cache, **sizes, "kld": kld, "predicted": predicted, **about}


def test_grid_orders_layers_and_candidates() -> None:
    layers, candidates, values = pictures.grid(measured([0, 2, 10]), "e_k")
    assert layers == [0, 2, 10]
    order = "k2v2 k2v4 k4v2 k4v4 k2v8 k8v2 k4v8 k8v4 k8v8"
    assert candidates == [f"{name}@kivi" for name in order.split()]
    assert values.shape == (9, 3)
    assert values[:, 1].tolist() == [2.0 ** -int(name[1]) for name in order.split()]


def test_grid_has_nan_where_rows_lack_the_error() -> None:
    rows = [row for row in measured([0, 1]) if (row["layer"], row["cache"]) != (1, "k2v2@kivi")]
    rows[0]["kld"] = 0.5  # layer 1's first that is left, k2v4
    _, candidates, e_o = pictures.grid(rows, "e_o")
    assert np.argwhere(np.isnan(e_o)).tolist() == [[candidates.index("k2v2@kivi"), 1]]
    _, _, kld = pictures.grid(rows, "kld")
    assert np.argwhere(np.isfinite(kld)).tolist() == [[candidates.index("k2v4@kivi"), 1]]


def test_floored_keeps_what_a_log_scale_shows() -> None:
    values = pictures.floored([0.5, 0, -1e-9, None, 1e-6])
    assert values[[0, 4]].tolist() == [0.5, 1e-6]
    assert values[[1, 2]].tolist() == [5e-7, 5e-7]
    assert math.isnan(values[3])
    assert pictures.floored([[0.0, 0.0]]).tolist() == [[0.5, 0.5]]


def test_undominated() -> None:
    bits, kld = np.array([5.0, 3.0, 4.0, 4.0, 6.0, 3.0, 7.0]), np.array([0.1, 0.9, 0.3, 0.2, 0.2, 0.9, math.nan])
    assert pictures.undominated(bits, kld) == [1, 3, 0]
    assert pictures.undominated(bits[:0], kld[:0]) == []


@pytest.mark.parametrize(
    ("layers", "text"),
    [([7], "7"), ([29, 0, 2, 1], "0-2+29"), ([9, 10, 12], "9-10+12"), (list(range(80)), "0-79")],
)
def test_layers_text(layers: list[int], text: str) -> None:
    assert pictures.layers_text(layers) == text


def test_heat_map() -> None:
    rows = [row for row in measured(list(range(45))) if (row["layer"], row["cache"]) != (3, "k4v4@kivi")]
    rows[0]["predicted"] = 0.0
    figure = pictures.heat_map(rows, "predicted")
    axis, bar = figure.axes
    cells = axis.collections[0].get_array()
    assert cells.shape == (9, 45)
    assert np.argwhere(np.ma.getmaskarray(cells)).tolist() == [[3, 3]]
    norm = axis.collections[0].norm
    assert 0 < cells.min() < norm.vmin  # the zero is below all colours
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(layer) for layer in range(0, 45, 2)]
    assert [label.get_text().split() for label in axis.get_yticklabels()][2:4] == [["k4v2", "4.00"], ["k4v4", "5.00"]]
    assert axis.get_ylabel() == "candidate @kivi, its bits"
    assert bar.get_xlabel() == pictures.ERRORS["predicted"] + "; black: 0"


@pytest.mark.parametrize("value", [0.0, 0.3, None])
def test_heat_map_of_one_cell(value: float | None) -> None:
    row = {"layer": 5, "cache": "k4v2@kivi", "bits_asymptotic": 4.0, "e_o": value}
    figure = pictures.heat_map([row], "e_o")
    axis, bar = figure.axes
    assert axis.collections[0].get_array().count() == (value is not None)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["5"]
    assert bar.get_xlabel() == pictures.ERRORS["e_o"] + ("; black: 0" if value == 0 else "")


def test_clusters() -> None:
    rows = [row for row in measured(list(range(6))) if (row["layer"], row["cache"]) != (4, "k4v2@kivi")]
    groups = [
        {"layers": [0, 1, 2, 5], "candidates": ["k8v8@kivi", "k4v4@kivi", "k4v2@kivi"]},
        {"layers": [4], "candidates": ["k8v8@kivi", "k4v2@kivi"]},
        {"layers": [3], "candidates": ["k2v2@kivi"]},
    ]
    figure = pictures.clusters(rows, groups)
    *panels, blank, _ = figure.axes
    assert [panel.get_title() for panel in panels] == ["layers 0-2+5", "layer 4", "layer 3"]
    assert not blank.axison and all(panel.get_yscale() == "log" for panel in panels)
    assert len({panel.get_ylim() for panel in panels}) == 1
    assert [[label.get_text() for label in panel.get_xticklabels()] for panel in panels] == [
        ["k4v2", "k4v4", "k8v8"],
        ["k4v2", "k8v8"],
        ["k2v2"],
    ]
    errors = {(row["layer"], row["cache"]): row["e_o"] for row in rows}
    lines = [line.get_ydata() for line in panels[0].lines]
    assert [list(line) for line in lines] == [
        [errors[layer, f"{name}@kivi"] for name in ("k4v2", "k4v4", "k8v8")] for layer in (0, 1, 2, 5)
    ]
    assert np.isnan(panels[1].lines[0].get_ydata()).tolist() == [True, False]


def test_clusters_of_one_layer_without_error() -> None:
    rows = [{"layer": 0, "cache": "k8v8@kivi", "bits_asymptotic": 9.0, "e_o": 0.0}]
    figure = pictures.clusters(rows, [{"layers": [0], "candidates": ["k8v8@kivi"]}])
    panel, _ = figure.axes
    assert panel.get_title() == "layer 0" and panel.lines[0].get_ydata() == [0.5]


def test_clusters_break_a_long_title() -> None:
    group = {"layers": list(range(0, 40, 2)), "candidates": ["k2v2@kivi", "k8v8@kivi"]}
    figure = pictures.clusters(measured(list(range(40))), [group] * 16)
    title = figure.axes[0].get_title()
    assert title.replace("\n", "") == "layers " + pictures.layers_text(group["layers"])
    assert max(map(len, title.splitlines())) <= 40


def test_front() -> None:
    rows = [
        plan("uniform", "k4v4@kivi", 5, 0.05),
        plan("uniform", "k8v8@kivi", 9, 0.0),
        plan("search", "0:k8v8@kivi;1:k2v2@kivi", 6, 0.02, 0.01),
        plan("search", "0:k4v4@kivi;1:k2v2@kivi", 4, 0.2, 0.1),
        plan("search", "0:k2v2@kivi;1:k8v8@kivi", 6, 0.9, None),
        plan("chosen", "0:k8v8@kivi;1:k2v2@kivi", 6, 0.02, 0.01),
    ]
    figure = pictures.front(rows)
    axis = figure.axes[0]
    predicted, stairs = (line.get_xydata().tolist() for line in axis.lines)
    assert predicted == [[4, 0.1], [6, 0.01]]
    assert stairs == [[4, 0.2], [6, 0.2], [6, 0.02]]
    points = {marks.get_label(): marks.get_offsets().tolist() for marks in axis.collections}
    assert points == {
        "searched": [[6, 0.02], [4, 0.2], [6, 0.9]],
        "searched, on the front": [[4, 0.2], [6, 0.02]],
        "uniform @kivi": [[5, 0.05], [9, 0.005]],
        "chosen: 6.00 bits (5.00 without scales), KL 0.02": [[6, 0.02]],
    }
    assert [text.get_text() for text in axis.texts] == ["k4v4", "k8v8 (KL 0)"]
    assert figure.get_suptitle() == "qwen3, wikitext2, kivi; lower left is better"
    assert axis.get_yscale() == "log"


@pytest.mark.parametrize("kind", ["search", "chosen"])
def test_front_of_one_plan(kind: str) -> None:
    figure = pictures.front([plan(kind, "k4v4@kivi", 5, 0.0)])
    assert all(marks.get_offsets().tolist() == [[5, 0.5]] for marks in figure.axes[0].collections)
