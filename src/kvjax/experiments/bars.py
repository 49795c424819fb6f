"""How far a program is, on standard error: bars, or lines where that is no terminal, and what is being compiled."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvjax.experiments import compilation

T = TypeVar("T")
Tell = Callable[[str, int, int], None]
"""tell(stage, done, total): a stage's name, and behind a comma what may change while it goes on."""


@contextlib.contextmanager
def shown(unit: str = "") -> Iterator[Tell]:
    """Shows every stage of tell(stage, done, total), and what is compiled meanwhile."""
    compiling = compilation.Compiling()
    with compilation.told(compiling):
        if not sys.stderr.isatty():
            yield _Lines(unit)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
        )
        with Progress(*columns, TimeElapsedColumn(), compiling, console=Console(stderr=True)) as progress:
            tasks: dict[str, TaskID] = {}

            def tell(stage: str, done: int, total: int) -> None:
                name = stage.partition(", ")[0]
                if name not in tasks:
                    tasks[name] = progress.add_task(stage)
                progress.update(tasks[name], description=stage, completed=done, total=total)

            yield tell


class _Lines:
    """A line for a stage when it begins, every few seconds, and when it ends."""

    def __init__(self, unit: str):
        self._unit, self._stage, self._last = unit, "", -compilation.EVERY

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = stage.partition(", ")[0]
        if name == self._stage and done < total and time.monotonic() - self._last < compilation.EVERY:
            return
        self._stage, self._last = name, time.monotonic()
        print(f"{stage}: {done}/{total} {self._unit}".rstrip(), file=sys.stderr, flush=True)


def track(items: Sequence[T], stage: str) -> Iterator[T]:
    """The items, one after the other, shown as a stage."""
    with shown() as tell:
        for done, item in enumerate(items):
            tell(stage, done, len(items))
            yield item
        tell(stage, len(items), len(items))
