"""Values that users give, checked in one line."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from kvjax.errors import KvjaxError

REMOTE = ("gs://", "s3://", "az://")
MOST = 2**31 - 1  # of anything that is counted: tokens, sequences


def check_whole(name: str, value: Any, least: int, most: int = MOST, note: str = "") -> int:
    """The value as an int.

    Args:
      name: the argument, for the message.
      value: what was given.
      least: the smallest value.
      most: the largest value.
      note: more on what is expected.

    Raises:
      KvjaxError: it is no whole number from `least` to `most`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        bounded = most < MOST or (number is not None and number > most)
        expected = f"{least} to {most}" if bounded else f"{least} or more" if least == 0 else f"at least {least}"
        raise KvjaxError(f"{name}={show(value)}; expected {expected}{note}")
    return number


def check_real(name: str, value: Any, expected: str) -> float:
    """The value as a float, NaN included. Raises KvjaxError where it is no number that a float can hold."""
    try:
        if not isinstance(value, bool | str | bytes) and hasattr(value, "__float__"):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise KvjaxError(f"{name}={show(value)}; expected {expected}")


def check_flag(name: str, value: Any) -> bool:
    """The value as a bool. Raises KvjaxError for anything else: "no" is not False."""
    if value is True or value is False or type(value) is np.bool_:
        return bool(value)
    raise KvjaxError(f"{name}={show(value)}; expected True or False")


def check_progress(value: Any) -> Callable[..., None]:
    """What hears how far a call is; nothing does where None. Raises KvjaxError for what cannot be called."""
    if value is not None and not callable(value):
        raise KvjaxError(f"progress is of type {type(value).__name__}; expected what can be called")
    return value or (lambda *_: None)


def check_path(name: str, value: Any) -> Path:
    """The value as a path; a URL of REMOTE as an epath.Path, which has the methods of a Path.

    Args:
      name: the argument, for the message.
      value: what was given.

    Raises:
      KvjaxError: it is neither a text nor a path, or no file can be called so.
    """
    if not isinstance(value, str | os.PathLike):
        raise KvjaxError(f"{name} is of type {type(value).__name__}; expected a path")
    if value == "":
        raise KvjaxError(f"{name} is empty; expected a path")
    path: Any = epath.Path(value) if os.fspath(value).startswith(REMOTE) else Path(value)
    try:
        possible = b"\x00" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise KvjaxError(f"{name}={show(value)}; expected a path without NUL or half a character")
    return path


def show(value: Any) -> str:
    """A value for a message; its type where it cannot be shown, as whole numbers of more than 4300 digits."""
    try:
        return repr(value)
    except ValueError:
        return f"a value of type {type(value).__name__} that is too long to show"
