"""Tables on standard output, in 80 columns: numbers stay whole, names fold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvjax.experiments.help import WIDTH


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Prints rows below a title and a header.

    Args:
      title: what the numbers are of.
      header: names of the columns.
      rows: their cells.
      left: how many columns are names, which fold and stand to the left.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, overflow="fold", justify="left" if i < left else "right", no_wrap=i >= left)
    for row in rows:
        table.add_row(*row)
    Console(width=WIDTH).print(table)
