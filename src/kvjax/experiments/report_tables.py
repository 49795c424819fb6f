"""Tables of result rows: which columns, in which order, how a value reads; as CSV and as LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.evaluate.sweep import COLUMNS

Row = Mapping[str, Any]
PROVENANCE = ("device", "versions", "git")
FIRST = (
    *("cache", "error", "kind", "search", "budget", "layer", "model", "text", "family", "form", "condition"),
    *(*COLUMNS.values(), "kld", "nll_increase", "nll", "top1", "kld_p99", "ppl"),
)  # the order of the columns that a reader looks for; the others follow as rows have them
FIGURES = {*COLUMNS.values(), "cache", "error", "layer", "kld", "nll_increase", "nll", "top1", "kld_p99", "ppl"}
HEADINGS = {key: name for name, key in COLUMNS.items()} | {
    **{"kld": "KL", "kld_p99": "KL p99", "top1": "top-1", "compression": "× smaller", "better_by": "better by"},
    **{"nll_increase": "nll increase", "cache": "cache", "git": "commit"},
}
FORMS = {**dict.fromkeys(COLUMNS.values(), ".2f"), "nll": ".4f", "top1": ".3f", "ppl": ".2f"}
ERRORS = {"_se": "standard error", "_ci95": "95 % interval"}  # by the end of their keys
HASH = 12  # characters of a checksum
LATEX_COLUMNS = 12  # that a page holds; CSV has all
_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"∞": r"$\infty$", "±": r"$\pm$", "×": r"$\times$", "…": r"\ldots{}", "–": "--"},
}


class Cell(NamedTuple):
    """A value as it reads, and as it sorts: a number, or None where the text sorts."""

    text: str
    number: float | int | None = None

    @property
    def sorted_by(self) -> str:
        """The number as JavaScript reads it."""
        return str(self.number).replace("inf", "Infinity").replace("nan", "NaN")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one program in one file.

    name: of the table's files, of letters, digits, dots and dashes.
    title: for readers.
    rows: as on disk.
    """

    name: str
    title: str
    rows: Sequence[Row]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What all rows share and no row measured."""
        first, shared = self.rows[0], {}
        for key, value in first.items():
            same = all(key in row and repr(row[key]) == repr(value) for row in self.rows)
            if (
                same
                and key not in FIGURES
                and key not in PROVENANCE
                and (len(self.rows) > 1 or isinstance(value, str))
            ):
                shared[key] = value
        return shared

    @functools.cached_property
    def keys(self) -> list[str]:
        """What rows have beside provenance, in the order of columns."""
        found = dict.fromkeys(key for row in self.rows for key in row if key not in PROVENANCE)
        return [*(key for key in FIRST if key in found), *(key for key in found if key not in FIRST)]

    @functools.cached_property
    def columns(self) -> list[str]:
        """The keys that have a column: those that are no settings, and no error of another's figure."""
        errors = {f"{key}{end}" for key in self.keys for end in ERRORS}
        return [key for key in self.keys if key not in self.settings and key not in errors]

    @functools.cached_property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(cell(row, key).number is not None for row in self.rows) for key in self.columns]

    def cells(self, row: Row) -> list[Cell]:
        """A row's cells, one a column."""
        return [cell(row, key) for key in self.columns]

    def csv(self) -> str:
        """All keys of all rows, as they are; lists and tables as JSON."""
        keys = [*self.keys, *(key for key in PROVENANCE if any(key in row for row in self.rows))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(keys)
        writer.writerows([_plain(row.get(key)) for key in keys] for row in self.rows)
        return text.getvalue()

    def latex(self) -> str:
        """A longtable of the first columns, as the page shows them."""
        columns = self.columns[:LATEX_COLUMNS]
        places = "".join("r" if number else "l" for number in self.numeric[: len(columns)])
        lines = [
            f"% {' '.join(self.title.split())}",
            f"\\begin{{longtable}}{{{places}}}",
            f"{_latex_line(map(heading, columns))}\\hline",
            *(_latex_line(cell(row, key).text for key in columns) for row in self.rows),
            "\\end{longtable}",
        ]
        return "\n".join(lines)


def heading(key: str) -> str:
    """A column's name."""
    return HEADINGS.get(key, key.replace("_", " "))


def cell(row: Row, key: str) -> Cell:
    """The value of a row, with its error where the row has one."""
    value: Any = row.get(key)
    ends = [row[f"{key}{end}"] for end in ERRORS if _is_number(row.get(f"{key}{end}"))]
    if not _is_number(value):
        return Cell(words(value)[:HASH] if key.endswith("sha256") else words(value))
    return Cell(" ± ".join([number(value, FORMS.get(key, ".4g")), *(number(end, ".2g") for end in ends)]), value)


def number(value: float, form: str) -> str:
    """A number as it reads: 12, 0.25, ∞, NaN."""
    if isinstance(value, int):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return "NaN" if math.isnan(value) else f"{value:{'.0f' if 1e3 <= abs(value) < 1e15 else form}}"


def words(value: Any) -> str:
    """Anything but a number as it reads; long lists by their length and range."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and (numbers := list(_numbers(value))):
        return f"{len(numbers)} values, {number(min(numbers), '.3g')} to {number(max(numbers), '.3g')}"
    if _is_number(value):
        return number(value, ".4g")
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def file_name(text: str) -> str:
    """A name of letters, digits, dots and dashes."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "rows"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> Iterable[float]:
    """All numbers in nested lists."""
    for each in value if isinstance(value, list) else []:
        if _is_number(each):
            yield each
        else:
            yield from _numbers(each)


def _plain(value: Any) -> str:
    """A value in CSV."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _latex_line(cells: Iterable[str]) -> str:
    escape = lambda text: "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))  # noqa: E731
    return " & ".join(map(escape, cells)) + r" \\"
