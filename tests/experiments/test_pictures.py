"""Every picture, measured: no text over another, none outside, no legend over what is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from kvjax.caches.registry import methods, parse_spec
from kvjax.experiments import curves, learn, pages, pareto, quality, style, tune_pictures
from kvjax.records import read_rows

SLACK = 1.0  # pixels that boxes may share: letters do not fill them
RUN = {"model": "m", "text": "t", "windows": 2, "context": 8, "protocol": "streaming"}


def faults(figure: Figure) -> list[str]:
    """What is wrong in a picture, in words."""
    figure.draw_without_rendering()
    texts = shown_texts(figure)
    boxes = [corners(Text.get_window_extent(text)) for text in texts]
    said = [repr(text.get_text()) for text in texts]
    found = [
        f"{said[i]} over {said[j]}"
        for i, j in itertools.combinations(range(len(texts)), 2)
        if overlap(boxes[i], boxes[j])
    ]
    left, bottom, right, top = corners(figure.bbox.padded(2 * SLACK))
    for box, name in zip(boxes, said, strict=True):
        if box[0] < left or box[1] < bottom or box[2] > right or box[3] > top:
            found.append(f"{name} outside the picture")
    for legend in figure.findobj(Legend):
        own, frame = legend.findobj(Text), legend.get_window_extent()
        inside = [overlap(box, corners(frame)) and text not in own for text, box in zip(texts, boxes, strict=True)]
        found += [f"{name} over a legend" for name, covered in zip(said, inside, strict=True) if covered]
        if any(frame.count_contains(drawn(axis)) for axis in figure.axes):
            found.append("a legend covers what is drawn")
    for axis in figure.axes:
        notes = [boxes[texts.index(note)] for note in axis.texts if note in texts]
        found += ["a note outside its panel" for box in notes if not overlap(box, corners(axis.bbox))]
    return found


def corners(box: Bbox) -> tuple[float, float, float, float]:
    """Left, bottom, right and top in pixels, without the slack."""
    return box.x0 + SLACK, box.y0 + SLACK, box.x1 - SLACK, box.y1 - SLACK


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def shown_texts(figure: Figure) -> list[Text]:
    """All texts that can be seen."""
    hidden: set[Text] = set()
    for axis in figure.axes:
        for line in (axis.xaxis, axis.yaxis):
            low, high = sorted(line.get_view_interval())
            for tick in [*line.get_major_ticks(), *line.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high or not line.get_visible():
                    hidden |= {tick.label1, tick.label2}
        hidden |= set() if axis.axison else {*axis.xaxis.findobj(Text), *axis.yaxis.findobj(Text)}
    texts = [text for text in figure.findobj(Text) if text not in hidden]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def drawn(axis: Axes) -> np.ndarray:
    """Points [n, 2] in pixels along lines and marks inside a panel."""
    lines = [line.get_transform().transform(np.asarray(line.get_xydata(), float)) for line in axis.lines]
    parts = [np.empty((0, 2)), *(along(points) for points in lines)]
    for marks in axis.collections:
        if isinstance(marks, LineCollection):
            parts += [along(axis.transData.transform(each)) for each in marks.get_segments() if len(each)]
        elif isinstance(marks, PathCollection):
            parts.append(axis.transData.transform(marks.get_offsets()))
        else:  # bands and cells
            parts += [along(axis.transData.transform(path.vertices)) for path in marks.get_paths()]
    points = np.concatenate(parts)
    return points[((points >= axis.bbox.min) & (points <= axis.bbox.max)).all(1)]


def along(points: np.ndarray) -> np.ndarray:
    steps = np.linspace(0, 1, 50)[:, None]
    return np.concatenate([points, *(a + steps * (b - a) for a, b in itertools.pairwise(points))])


# ---- the pictures


@pytest.mark.parametrize("name", pages.PICTURES)
def test_the_pages_pictures_of_the_committed_rows(name: str) -> None:
    file, draw = pages.PICTURES[name]
    figure = draw(read_rows(pages.ROOT / "results" / file))
    assert not faults(figure)
    assert figure.get_suptitle() and any(axis.get_xlabel() for axis in figure.axes)


def made_curves() -> Figure:
    rows = [RUN | {"kld": 0.1 * 2.0**-i, "kld_se": 0.01 * 2.0**-i} for i in range(6)]
    return curves.draw({name: (range(6), rows) for name in ("k4v4@kivi", "k2v2@kivi", "dense")}, "layer")


def made_lessons() -> Figure:
    curve = [[step, math.exp(-step / 50)] for step in range(0, 200, 20)]
    about = RUN | {"cache": "xclr3(basis=learned)", "curve": curve}
    return learn.draw([about | {"layer": layer, "first": i + 1} for i, layer in enumerate([0, 1, "all"])])


def made_families() -> Figure:
    families = [("per token", ""), ("per token", "fit=mse"), ("x", ""), *(("x", f"rival{i}{{b}}") for i in range(20))]
    rows = []
    for (family, form), condition, bits in itertools.product(families, ("stored", "exact"), (2, 3, 4)):
        cache = (form or "k{b}v{b}@token").replace("{b}", str(bits))
        about = RUN | {"family": family, "form": form, "condition": condition, "cache": cache}
        rows.append(about | {"bits_512": bits + 0.5, "bits_8192": bits, "kld": len(form or family) * 2.0**-bits})
    return quality.draw(rows)


def made_front() -> Figure:
    rng = np.random.default_rng(0)
    kinds = ["search"] * 30 + ["uniform"] * 12 + ["chosen"]
    rows = []
    for i, kind in enumerate(kinds):
        bits = float(rng.uniform(3, 8))
        name = f"k{2 + i % 4}v{2 + i % 3}@kivi(sink={i})"
        figures = {"bits_asymptotic": bits, "bits_nominal": bits - 1, "kld": float(2.0**-bits * rng.uniform(1, 4))}
        rows.append(RUN | {"kind": kind, "cache": name, "method": "knapsack", "predicted": 0.1 / bits} | figures)
    return tune_pictures.front(rows)


def made_groups() -> Figure:
    rows = read_rows(pages.ROOT / "results/sensitivity.jsonl")
    candidates = list(dict.fromkeys(row["cache"] for row in rows))
    layers = [list(range(0, 30, 2)), [1, 3, 5], list(range(7, 30, 2))]
    return tune_pictures.clusters(rows, [{"layers": each, "candidates": candidates} for each in layers])


def made_sweep() -> Figure:
    """More points than have names, some of them where the axis has no place."""
    rows = [row for row in read_rows(pages.ROOT / "results/wikitext2-parallel.jsonl") if row["dtype"] == "float32"]
    bad = [rows[3] | {"cache": "x2@input(sink=4)", "kld": math.inf}, rows[4] | {"cache": "x3@head", "kld": math.nan}]
    return pareto.draw([*rows, *bad, RUN | {"cache": "x2@input", "error": "out of memory"}])


MADE = [made_curves, made_lessons, made_families, made_front, made_groups, made_sweep]


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_other_pictures(make: Callable[[], Figure]) -> None:
    assert not faults(make())


# ---- what measures them


def legend_over_text(figure: Figure, axis: Axes) -> None:
    axis.text(0, 1, "here", va="top")
    axis.legend(loc="upper left")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (style.legend, None),
        (lambda figure, axis: axis.legend(loc="upper right"), "a legend covers what is drawn"),
        (lambda figure, axis: [axis.text(0.5, y, "here") for y in (0.1, 0.11)], "'here' over 'here'"),
        (legend_over_text, "'here' over a legend"),
        (
            lambda figure, axis: figure.text(0.95, 0.2, "a text without end"),
            "'a text without end' outside the picture",
        ),
        (lambda figure, axis: axis.text(0, 5, "here").set_in_layout(False), "a note outside its panel"),
        (lambda figure, axis: axis.set_xticks([0, 0.01], ["zero", "one"]), "'zero' over 'one'"),
    ],
    ids=["good", "legend, line", "text, text", "text, legend", "text outside", "note outside", "ticks"],
)
def test_what_measures_pictures_finds_faults(spoil: Callable[[Figure, Axes], Any], fault: str | None) -> None:
    figure, ((axis,),) = style.subplots()
    axis.plot([0, 1], [0, 1], label="a line")
    axis.set(xlabel="x", ylabel="y")
    spoil(figure, axis)
    found = faults(figure)
    assert fault in found if fault else not found


# ---- names


def canonical_names() -> Iterator[str]:
    for method in methods():
        yield from method.examples
    yield from (f"xclr{bits}" for bits in (2, 3, 4))


def test_a_short_name_is_the_same_cache() -> None:
    for name in canonical_names():
        spec = parse_spec(name)
        short = style.short_name(str(spec))
        assert parse_spec(short) == spec and len(short) <= len(str(spec))
    assert style.short_name("xcl3@latent(sink=4,per=channel,fold=1,rotate=1,fit=mse)") == "xclr3"
    assert style.short_name("xcl2@latent(sink=4,per=channel,fold=1,rotate=1)") == "xclr2(fit=minmax)"
    assert style.short_name("of a plugin@that(is=not,loaded=1)") == "of a plugin@that(is=not,loaded=1)"


def test_a_long_mixture_is_named_by_what_most_layers_have() -> None:
    assert style.short_name("0:k8v8@kivi;1:k4v4@kivi") == "0:k8v8@kivi;1:k4v4@kivi"
    assert style.short_name("0+2:k8v8@kivi;1+3-9:k4v4@kivi;10:dense") == "mixed, most k4v4@kivi"


@pytest.mark.parametrize(
    ("caches", "names", "shared"),
    [
        (["k4v2@kivi", "k8v8@kivi"], ["k4v2", "k8v8"], " @kivi"),
        (["k4v2@kivi", "k4v2@token"], ["k4v2@kivi", "k4v2@token"], ""),
        (["k4v2@kivi(sink=4)", "k2v2@kivi(sink=4)"], ["k4v2", "k2v2"], " @kivi(sink=4)"),
        (["xcl3@input(sink=4,fold=1) above its base", "x3"], ["xcl3@input(…) above its base", "x3"], ""),
        (
            ["xcl3@input(sink=4,fold=1)", "xcl3@input(fold=1)"],
            ["xcl3@input(sink=4,fold=1)", "xcl3@input(fold=1)"],
            "",
        ),
        (["dense", "k4v2@kivi"], ["dense", "k4v2@kivi"], ""),
        (["xcl4"], ["xcl4"], ""),
        ([], [], ""),
    ],
)
def test_short_names_tell_caches_apart(caches: list[str], names: list[str], shared: str) -> None:
    assert style.short_names(caches) == (names, shared)
