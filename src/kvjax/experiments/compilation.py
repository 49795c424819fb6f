"""Compiling, which takes longer than all else at the start: kept for the next start, and said while it goes on."""

from __future__ import annotations

import contextlib
import functools
import glob
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from kvjax.downloads import cache_folder

MOST_BYTES = 2 * 2**30  # of kept programs; those that were not used for longest go first
LEAST_SECONDS = 0.1  # of compiling a program that is kept
EVERY = 5.0  # seconds between two lines where output is no terminal


def keep_programs() -> None:
    """Keeps compiled programs in $KVJAX_CACHE/compiled, unless JAX's own settings name another folder.

    A folder that cannot be made costs only the time to compile again.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_folder() / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        warnings.showwarning = functools.partial(_drop_torn, folder, warnings.showwarning)


def _drop_torn(folder: Path, show: Callable[..., None], message: Warning | str, *where: Any, **how: Any) -> None:
    """Shows warnings but those of kept programs: one that cannot be read (a full disk tore it) is removed.

    JAX itself leaves it there, compiles again at every start and says so.
    """
    found = re.match(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'", str(message))
    if found is None:
        show(message, *where, **how)
        return
    for file in folder.glob(f"{glob.escape(found[2])}-*-cache"):
        file.unlink(missing_ok=True)


class Compiling(ProgressColumn):
    """For how long JAX has been compiling a program, as a column of a progress bar; empty while it does not."""

    def __init__(self) -> None:
        super().__init__()
        self._since: float | None = None
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":  # comes when it ends, and the compiler starts
            self._since = time.monotonic()
        elif event == "/jax/core/compile/backend_compile_duration":
            self._since = None

    @property
    def seconds(self) -> float:
        """0 where nothing is being compiled."""
        since = self._since  # another thread sets it
        return 0.0 if since is None else time.monotonic() - since

    def render(self, task: Task) -> Text:
        return Text(f"compiling, {self.seconds:.0f} s" if self.seconds >= 1 else "")


@contextlib.contextmanager
def told(compiling: Compiling) -> Iterator[None]:
    """Where standard error is no terminal: lines while a program is being compiled, each after twice the time."""
    over = threading.Event()

    def tell() -> None:
        due = 1.0
        while not over.wait(EVERY):
            if (seconds := compiling.seconds) >= due:
                print(f"compiling, {seconds:.0f} s", file=sys.stderr, flush=True)
                due = 2 * seconds
            elif seconds < EVERY:  # another program
                due = 1.0

    if not sys.stderr.isatty():
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Shows what `Compiling` has to say while nothing else is shown, on any standard error."""
    compiling, console = Compiling(), Console(stderr=True)
    bars = Progress(compiling, console=console, transient=True, disable=not console.is_terminal)
    with told(compiling), bars:
        bars.add_task("")
        yield
