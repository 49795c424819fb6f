"""Values that users give, checked in one line."""

from __future__ import annotations

import operator
from typing import Any

from kvjax.errors import KvjaxError


def check_whole(name: str, value: Any, least: int, most: int | None = None, note: str = "") -> int:
    """The value as an int.

    Args:
      name: the argument, for the message.
      value: what was given.
      least: the smallest value.
      most: the largest value; None is no bound.
      note: more on what is expected.

    Raises:
      KvjaxError: it is no whole number from `least` to `most`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        expected = (
            f"{least} to {most}" if most is not None else f"{least} or more" if least == 0 else f"at least {least}"
        )
        raise KvjaxError(f"{name}={value!r}; expected {expected}{note}")
    return number


def check_real(name: str, value: Any, expected: str) -> float:
    """The value as a float, NaN included. Raises KvjaxError where it is no number."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise KvjaxError(f"{name}={value!r}; expected {expected}")
    return float(value)
