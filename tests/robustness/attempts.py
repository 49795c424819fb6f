"""One attempt at something bad: it gives a result or one clear line, in bounded time and memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kvjax.errors import KvjaxError

MEMORY = 1 << 29  # bytes that one attempt may add to the peak of the process


class Kind(Protocol):
    """One kind of input.

    Attributes:
      name: in result rows.
    """

    @property
    def name(self) -> str: ...

    def attempt(self, seed: int, seconds: float = 30.0) -> str:
        """Says "loaded" (there was a result) or "refused"; what it raises else has a note that repeats it."""


class OutOfBounds(BaseException):
    """An attempt took too long or too much memory; no Exception, so that no loader takes it for its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfBounds in the main thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise OutOfBounds(f"took more than {seconds} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def attempt(call: Callable[[], Any], seconds: float = 30.0, naming: str = "") -> str:
    """Says "loaded" or "refused"; whatever else the call raises passes through.

    Args:
      call: what is tried.
      seconds: that it may take.
      naming: what a refusal must name.

    Raises:
      OutOfBounds: too long, too much memory, or a refusal that does not name what it must.
    """
    before = _peak()
    with time_limit(seconds):
        try:
            call()
            outcome = "loaded"
        except KvjaxError as error:
            outcome, line = "refused", str(error)
            if naming not in line:
                raise OutOfBounds(f"the refusal does not name {naming}: {line}") from None
    if (added := _peak() - before) > MEMORY:
        raise OutOfBounds(f"took {added >> 20} MiB")
    return outcome


def _peak() -> int:
    """The most memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
