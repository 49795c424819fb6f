"""One page of any result folders: tables, pictures, plans by layer, and where the figures come from.

    kvjax report DIR... [--out=FILE]

Reads the rows of all *.jsonl files in each DIR and writes FILE, report.html in the first DIR where it is not given: a
page on its own, with no requests to outside. Beside it lie FILE's .tex with all tables and a .csv for each.
Pictures are drawn from rows of a known kind; other PNG files of a DIR are shown as they are.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2

from kvjax.caches.dense import Dense
from kvjax.caches.grammar import split_layers
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.experiments import (
    closed_loop,
    head_errors,
    learn,
    pareto,
    plans,
    positions,
    quality,
    roofline,
    searches,
    similarity,
    style,
    tune_pictures,
)
from kvjax.experiments.report_tables import PROVENANCE, Table, cell, file_name, heading, words
from kvjax.files import write_atomically
from kvjax.records import read_rows

Row = Mapping[str, Any]
RUN = ("model", "dtype", "text", "protocol", "context", "windows", "offset", "tokens")
MANY_LAYERS = 10**9  # above those of any plan, which need not say how many its model has


def _sensitivity(rows: Sequence[Any]) -> Any:
    return tune_pictures.heat_map(rows, "kld" if any("kld" in row for row in rows) else "e_o")


class Kind(NamedTuple):
    """How rows of a program are drawn: a picture for each set of rows that agree in some keys.

    file: the stem of the picture that the program leaves, which ours replaces.
    """

    draw: Callable[[Any], Any]
    file: str
    apart: tuple[str, ...] = RUN


KINDS = {  # by the experiment of rows
    "perplexity": Kind(pareto.draw, "pareto"),
    "plans": Kind(plans.draw, "plans", ("model", "calibrated_on", "windows")),
    "searches": Kind(searches.draw, "searches", ("model", "text", "judged_on")),
    "tune": Kind(tune_pictures.front, "front"),
    "sensitivity": Kind(_sensitivity, "sensitivity"),
    "quality": Kind(quality.draw, "quality", ("model",)),
    "frontier": Kind(quality.draw, "frontier", ("model",)),
    "frontier-authors": Kind(quality.draw, "frontier-authors", ("model",)),
    "positions": Kind(positions.draw, "positions"),
    "closed_loop": Kind(closed_loop.draw, "closed_loop"),
    "head_errors": Kind(head_errors.draw, "head_errors"),
    "similarity": Kind(similarity.draw, "similarity"),
    "roofline": Kind(roofline.draw, "roofline", ()),
    "learn": Kind(learn.draw, "learn", ("model", "cache")),
}


class Picture(NamedTuple):
    """A picture of the page: its data URI, what it shows, and its file where it is not ours."""

    uri: str
    shows: str
    file: str = ""


class Half(NamedTuple):
    """One number of a heat map's cell: the text, and the bits that colour it."""

    text: str
    bits: int


class Layer(NamedTuple):
    """A heat map's cell: the layer's method, and its keys' and values' bits, or one number for both."""

    method: str
    halves: tuple[Half, ...]


class PlanLine(NamedTuple):
    """A heat map's line: what the plan is of, its figures, and its layers."""

    name: str
    figures: tuple[str, str]
    layers: list[Layer | None]


class Section(NamedTuple):
    """What a folder holds."""

    folder: Path
    tables: list[Table]
    pictures: list[Picture]


def main(folders: Sequence[Path], out: Path) -> None:
    """Writes the page, and its tables as CSV and LaTeX beside it.

    Args:
      folders: with *.jsonl files of rows.
      out: the page's file.

    Raises:
      KvjaxError: a folder is none or has no rows, a file has a line that is no row, or a file cannot be written.
    """
    sections = [_section(folder, f"{i}-" * (len(folders) > 1)) for i, folder in enumerate(folders, 1)]
    tables = [table for section in sections for table in section.tables]
    for table in tables:
        write_atomically(_csv_file(out, table), table.csv().encode())
    latex = "\n\n".join(["% \\usepackage{longtable}", *(table.latex() for table in tables)])
    write_atomically(out.with_suffix(".tex"), f"{latex}\n".encode())
    write_atomically(out, _page(sections, tables, out).encode())
    print(f"page: {out}\ntables: {out.with_suffix('.tex')}, {out.with_name(out.stem)}-*.csv")


def _csv_file(out: Path, table: Table) -> Path:
    return out.with_name(f"{out.stem}-{table.name}.csv")


def _page(sections: Sequence[Section], tables: Sequence[Table], out: Path) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sources = _distinct(_source(row) for table in tables for row in table.rows)
    settings = _distinct(table.settings for table in tables)
    return environment.get_template("report.html").render(
        sections=sections,
        plans=plan_lines(tables),
        sources=sources,
        settings=settings,
        source_of=lambda row: sources.index(_source(row)) + 1,
        settings_of=lambda table: settings.index(table.settings) + 1,
        csv_of=lambda table: _csv_file(out, table).name,
        describe=lambda table: style.describe(table.settings),
        heading=heading,
        words=words,
        several=lambda table: len(_distinct(map(_source, table.rows))) > 1,
    )


def _source(row: Row) -> dict[str, Any]:
    """Where a row comes from."""
    return {key: row.get(key) for key in PROVENANCE}


def _distinct(values: Any) -> list[Any]:
    """The values, each once, in order."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


# ---- what folders hold


def _section(folder: Path, prefix: str) -> Section:
    """The tables and pictures of a folder; `prefix` tells apart the names of folders' tables."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise KvjaxError(f"{folder} is {what}; expected a folder with *.jsonl files of rows")
    tables = [table for file in sorted(folder.glob("*.jsonl")) for table in _tables(file, prefix)]
    if not tables:
        raise KvjaxError(f"{folder} has no rows; expected results.jsonl or other *.jsonl files in it")
    drawn = {kind: found for kind, found in _drawn(tables).items() if found}
    others = [
        Picture(_uri(file.read_bytes()), file.stem, file.name)
        for file in sorted(folder.glob("*.png"))
        if file.stem not in drawn
    ]
    return Section(folder, tables, [*itertools.chain(*drawn.values()), *others])


def _tables(file: Path, prefix: str) -> list[Table]:
    """A table for each program that has rows in a file."""
    rows = read_rows(file)
    programs = list(dict.fromkeys(str(row.get("experiment", "")) for row in rows))
    tables = []
    for program in programs:
        own = [row for row in rows if str(row.get("experiment", "")) == program]
        more = f"-{program}" * (len(programs) > 1)
        title = f"{file.name}: {program or 'rows'}"
        tables.append(Table(file_name(f"{prefix}{file.parent.resolve().name}-{file.stem}{more}"), title, own))
    return tables


def _drawn(tables: Sequence[Table]) -> dict[str, list[Picture]]:
    """Pictures of rows of a known kind, by the stem of the program's own picture."""
    pictures: dict[str, list[Picture]] = {}
    for table in tables:
        if kind := KINDS.get(str(table.rows[0].get("experiment"))):
            of = lambda row, kind=kind: repr([row.get(key) for key in kind.apart])  # noqa: E731
            for _, own in itertools.groupby(sorted(table.rows, key=of), of):
                pictures.setdefault(kind.file, []).extend(_picture(kind, list(own)))
    return pictures


def _picture(kind: Kind, rows: list[Row]) -> list[Picture]:
    """The picture of rows; none without matplotlib, or where another version or hand wrote what cannot be drawn."""
    try:
        figure = kind.draw(rows)
        return [Picture(_uri(style.png(figure)), figure.get_suptitle())]
    except Exception:  # whatever drawing raises of rows that lack figures: the tables show them
        return []


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# ---- plans by layer


def plan_lines(tables: Sequence[Table]) -> list[PlanLine]:
    """A line for every plan of several methods, the plans a search only passed through left out."""
    found: dict[str, PlanLine] = {}
    for row in (row for table in tables for row in table.rows):
        cache = row.get("cache")
        if isinstance(cache, str) and cache not in found and row.get("kind") != "search":
            methods = _methods(cache)
            layers = [_layer(methods[i]) if i in methods else None for i in range(max(methods, default=0) + 1)]
            if methods:
                found[cache] = PlanLine(_plan_name(row), _plan_figures(row), layers)
    return list(found.values())


def _plan_figures(row: Row) -> tuple[str, str]:
    """Bits with scales, and KL."""
    return cell(row, "bits_asymptotic").text, cell(row, "kld").text


def _plan_name(row: Row) -> str:
    parts = [str(row[key]) for key in ("search", "kind") if key in row]
    if "budget" in row:
        parts.append(f"budget {words(row['budget'])}")
    return ", ".join(parts) or style.short_name(row["cache"])


def _methods(plan: str) -> dict[int, str]:
    """Each layer's method; nothing where the text is no plan of several methods that numbers its layers."""
    if ";" not in plan:
        return {}
    try:
        return dict(split_layers(plan, MANY_LAYERS))
    except KvjaxError:
        return {}


def _layer(method: str) -> Layer:
    """A layer's cell."""
    try:
        spec: Any = parse_spec(method)
    except KvjaxError:  # of a plugin that is not loaded
        return Layer(method, (Half(method.partition("@")[0], 0),))
    bits = round(spec.bits_nominal)
    if isinstance(spec, Dense) or hasattr(spec, "key_bits"):
        pair = getattr(spec, "key_bits", bits), getattr(spec, "value_bits", bits)
        return Layer(method, tuple(Half(str(width), width) for width in pair))
    return Layer(method, (Half(method.partition("@")[0].partition("(")[0], bits),))


# ---- the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise KvjaxError(message)


def run(arguments: Sequence[str]) -> int:
    """Runs the command: bad input prints one line, and gives 2.

    Args:
      arguments: the command's, without its name.

    Returns:
      The exit status.
    """
    parser = _Parser(prog="kvjax report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a folder with *.jsonl files of rows")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page; report.html in the first DIR by default")
    try:
        asked = parser.parse_args(arguments)
        main(asked.folders, asked.out or asked.folders[0] / "report.html")
    except KvjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print("error: " + ": ".join(str(part) for part in (error.filename, error.strerror) if part), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
