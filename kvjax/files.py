"""Small helpers for files on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvjax.errors import KvjaxError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      KvjaxError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise KvjaxError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise KvjaxError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise KvjaxError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256(files: Iterable[Path]) -> str:
    """The sha256, in hex, of the files' bytes one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def brief(error: Exception) -> str:
    """The first line of what a library says, cut to fit into a line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
