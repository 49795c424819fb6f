"""Progress bars on standard error, one for every name that is told of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvjax.experiments import compilation

Tell = Callable[[str, int, int], None]


@contextlib.contextmanager
def shown(unit: str = "") -> Iterator[Tell]:
    """Shows a bar for each name of tell(name, done, total), what is compiled beside it."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn(f"{{task.completed}}/{{task.total}} {unit}")
    compiling = compilation.Compiling()
    tasks: dict[str, TaskID] = {}
    with (
        compilation.told(compiling),
        Progress(*columns, TimeElapsedColumn(), compiling, console=Console(stderr=True)) as bars,
    ):

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=done, total=total)

        yield tell
