"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def align_columns(rows: Sequence[Sequence[str]], left: int) -> str:
    """Lines of rows whose columns stand below one another.

    Args:
      rows: cells; a row may end early.
      left: how many columns are aligned left, the others right.
    """
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(widths[i]) if i < left else cell.rjust(widths[i]) for i, cell in enumerate(row))

    return "\n".join(line(row).rstrip() for row in rows)


def format_figure(row: Mapping[str, Any], key: str, form: str) -> str:
    """A number of a result row, in a format; "" where the row has none, as rows of earlier versions may."""
    return "" if row.get(key) is None else f"{row[key]:{form}}"


def format_with_error(row: Mapping[str, Any], key: str, form: str) -> str:
    """A number of a result row ± its standard error, which rows of earlier versions may lack."""
    error = format_figure(row, f"{key}_se", form)
    return format_figure(row, key, form) + f" ± {error}" * bool(error)


def format_ratio(reference: float, own: float) -> str:
    """How many times smaller a size is than a reference, or larger."""
    return f"{reference / own:.2f} x smaller" if own <= reference else f"{own / reference:.2f} x larger"
