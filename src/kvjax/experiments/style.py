"""The look that all pictures share: colours, sizes, short names of caches, and names beside points.

matplotlib is imported by the functions that need it, so that programs run without it; they only leave out pictures.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.extras import MissingExtra, needed
from kvjax.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Okabe and Ito's colours, told apart by all: the order of lines. Yellow is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS
YELLOW, GRAY = "#F0E442", "#6B6B6B"
MARKS = "osD^vP*"  # beside the colours, for readers who see none
DPI = 130
SMALL, PLAIN, TITLE = 8, 9, 10  # points: ticks, names and legends; axes; titles
GRID: dict[str, Any] = {"alpha": 0.3, "which": "both", "linewidth": 0.6}
BITS = "bits per cached element, scales included (dense: 16)"
KL = "KL divergence from the dense run (nats per token)"
LONG = 24  # characters of a name
_RISES = (1, 0, -1, 2, -2, 3, -3, 4, -4, 6, -6, 8, -8, 11, -11)
# The sides of a point that its name may stand on, the best first.
SIDES = [(x, y) for y in _RISES for x in (1, -1, 0, 4, -4) if abs(x) == 1 or abs(y) > 1 or (y and not x)]
STEP = 6.0, 5.0  # points: what a unit of SIDES moves a name by
Row = Mapping[str, Any]


def subplots(
    down: int = 1, across: int = 1, size: tuple[float, float] = (7.0, 4.6), **more: Any
) -> tuple[Figure, Any]:
    """An empty figure in the shared look, of no window system.

    Args:
      down: rows of panels.
      across: panels in each.
      size: width and height in inches.
      more: as of matplotlib's `subplots`.

    Returns:
      The figure, and its axes as an array [down, across].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, **more)
    for axis in axes.flat:
        axis.set_prop_cycle(color=COLORS)
        axis.grid(**GRID)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=SMALL)
        axis.xaxis.label.set_size(PLAIN)
        axis.yaxis.label.set_size(PLAIN)
    return figure, axes


def title(figure: Figure, text: str) -> None:
    """Writes what the picture is of above its panels, in lines that fit."""
    width = int(figure.get_figwidth() / 0.075)  # characters, on average
    figure.suptitle(textwrap.fill(text, width), fontsize=TITLE)


def legend(figure: Figure, axis: Axes, **more: Any) -> None:
    """Puts the legend of an axis below all panels, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        column = 0.6 + 0.062 * max(map(len, labels))  # inches
        columns = max(1, min(len(labels), int(figure.get_figwidth() / column)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL, **more)


def describe(row: Row) -> str:
    """Which run a row is of: model, text, windows and protocol, as far as it says."""
    parts = [str(row[key]) for key in ("model", "text") if key in row]
    if "model" in row and "dtype" in row:
        parts[0] += f" ({row['dtype']})"
    if {"windows", "context"} <= row.keys():
        plural = "s" * (row["windows"] != 1)
        parts.append("{windows} window{plural} of {context} tokens".format(**row, plural=plural))
    return ", ".join([*parts, *(str(row[key]) for key in ("protocol",) if key in row)])


def color_map() -> Any:
    """Colours of numbers, from dark to light: read alike by all, and in grey."""
    import matplotlib

    return matplotlib.colormaps["viridis"]


def scale(first: float, last: float) -> Any:
    """Colours of lines from dark to light, for numbers between two: `to_rgba`, and for a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    return ScalarMappable(Normalize(first, last), ListedColormap(color_map()(np.linspace(0, 0.9, 64))))


def png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    return picture.getvalue()


def write(file: Path, draw: Callable[..., Figure], *args: Any) -> None:
    """Draws a picture, writes it and prints its name; in its place what is missing, where an extra is.

    Args:
      file: the picture's.
      draw: makes the figure.
      args: of `draw`.

    Raises:
      KvjaxError: the file cannot be written.
    """
    try:
        with needed("matplotlib"):
            picture = png(draw(*args))
    except MissingExtra as error:
        print(f"no plot {file}: {error}")
        return
    write_atomically(file, picture)
    print(f"plot: {file}")


# ---- names of caches


@functools.lru_cache(maxsize=2**12)
def short_name(cache: str) -> str:
    """The shortest name of a plan that still says what it is: xclr3, and the commonest method of a long mixture."""
    shares = [segment.rpartition(":")[2] for segment in cache.split(";")]
    if len(shares) == 1 and ":" not in cache:
        return _shortest(cache)
    if len(cache) <= LONG:
        return cache
    counts = {share: count_layers(segment) for share, segment in zip(shares, cache.split(";"), strict=True)}
    return f"mixed, most {_shortest(max(counts, key=lambda share: counts[share]))}"


def count_layers(segment: str) -> int:
    """How many layers 0-2+29:k4v2 names; kinds of layers, such as sliding, are not counted."""
    ends = [part.split("-") for part in segment.partition(":")[0].split("+")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends if part[0].isdigit() and part[-1].isdigit())


def _shortest(text: str) -> str:
    """The shortest name of one method; the text itself where a plugin that is not loaded has it."""
    try:
        return parse_spec(text).short_text
    except KvjaxError:
        return text


def short_names(caches: Sequence[str]) -> tuple[list[str], str]:
    """Short names that tell the caches apart, without the mode that all share; and that mode, as behind a word.

    Long ones are also without their fields, where they can be told apart without.
    """
    names = [short_name(cache) for cache in caches]
    if len({*names}) < len({*caches}):
        names = list(caches)
    plain = [re.sub(r"^([^;(]*)\([^()]*\)([^;]*)$", r"\1(…)\2", name) for name in names]
    if max(map(len, names), default=0) > LONG and len({*plain}) == len({*names}):
        names = plain
    modes = {"".join(name.partition("@")[1:]) for name in names}
    shared = modes.pop() if len(modes) == 1 else ""
    return [name.removesuffix(shared) for name in names], shared and f" {shared}"


# ---- names beside points


def name_points(axis: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes each name beside its point, where it covers least of what is drawn.

    A thin line leads to one that is farther off. The last step of a figure: what else it has must stand.

    Args:
      axis: the panel.
      points: in the axis' units.
      names: theirs.
    """
    figure: Any = axis.figure
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
    figure.draw_without_rendering()
    ink, taken = _drawn(axis)
    for point, name in zip(points, names, strict=True):
        leader = {"arrowstyle": "-", "lw": 0.5, "color": GRAY, "shrinkA": 0, "shrinkB": 3}
        note: Any = axis.annotate(name, point, (0, 0), textcoords="offset points", fontsize=SMALL, arrowprops=leader)
        note.set_in_layout(False)
        box = functools.partial(_box_beside, axis.transData.transform(point), _size(note), figure.dpi / 72)
        side = min(SIDES, key=lambda side: _covered(box(side), axis, ink, taken) + 2 * abs(side[1]) + abs(side[0]))
        ha, va = (
            ("center", "left", "right")[int(np.sign(side[0]))],
            ("center", "bottom", "top")[int(np.sign(side[1]))],
        )
        note.arrow_patch.set_visible(max(map(abs, side)) > 1)
        note.set(position=(STEP[0] * side[0], STEP[1] * side[1]), ha=ha, va=va)
        taken.append(box(side))


def _size(note: Any) -> tuple[float, float]:
    """Width and height of an annotation's text in pixels."""
    from matplotlib.text import Text

    extent = Text.get_window_extent(note)  # an annotation's own takes in the line
    return extent.width, extent.height


def _box_beside(
    point: Float[np.ndarray, "2"], size: tuple[float, float], pixels: float, side: tuple[int, int]
) -> Bbox:
    """Where a text of this size in pixels lies on a side of a point; `pixels` a typographic point."""
    from matplotlib.transforms import Bbox

    left, bottom = (
        at + step * pixels * by - length * (1 - np.sign(by)) / 2
        for at, step, by, length in zip(point, STEP, side, size, strict=True)
    )
    return Bbox.from_bounds(left, bottom, *size)


def _covered(box: Bbox, axis: Axes, ink: Float[np.ndarray, "n 2"], taken: list[Bbox]) -> float:
    """How bad a place for a text is: outside the panel, over others, over lines."""
    outside = not all(axis.bbox.contains(*corner) for corner in (box.padded(3).min, box.padded(3).max))
    return 1000 * outside + 50 * box.padded(1).count_overlaps(taken) + box.padded(3).count_contains(ink)


def _drawn(axis: Axes) -> tuple[Float[np.ndarray, "n 2"], list[Bbox]]:
    """What is drawn in a panel, in pixels: points along its lines, and boxes of its marks and texts."""
    from matplotlib.transforms import Bbox

    pixels = axis.figure.dpi / 72
    ink: list[Any] = [np.empty((0, 2))]
    boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]

    def mark(points: Any, reach: float) -> None:
        boxes.extend(Bbox.from_bounds(x, y, 0, 0).padded(reach) for x, y in points if np.isfinite([x, y]).all())

    for line in axis.lines:
        path: Any = line.get_path().transformed(line.get_transform())
        if line.get_linestyle() not in ("None", "none"):
            ink.append(path.interpolated(20).vertices)
        if line.get_marker() not in ("None", None, ""):
            mark(path.vertices, line.get_markersize() / 2 * pixels)
    for marks in axis.collections:
        drawn: Any = marks
        if hasattr(drawn, "get_segments"):  # error bars
            segments = [axis.transData.transform(segment) for segment in drawn.get_segments() if len(segment)]
            ink += [_along(np.clip(segment, axis.bbox.min, axis.bbox.max)) for segment in segments]
        elif hasattr(drawn, "get_sizes") and len(drawn.get_sizes()):
            mark(axis.transData.transform(drawn.get_offsets()), drawn.get_sizes()[0] ** 0.5 / 2 * pixels)
    points = np.concatenate(ink)
    return points[np.isfinite(points).all(1)], boxes


def _along(segment: Float[np.ndarray, "m 2"], parts: int = 20) -> Float[np.ndarray, "n 2"]:
    """Points along a line."""
    shares = np.linspace(0, 1, parts)[:, None]
    return np.concatenate([start + shares * (end - start) for start, end in itertools.pairwise(segment)])
