"""Where the rows of a table come from, and which rows no table is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.errors import KvjaxError

Row = dict[str, Any]


def describe_source(rows: Sequence[Row]) -> str:
    """One line that names every device, version and commit of the rows, in their order."""
    devices = _join((row["device"] for row in rows), "; ")
    versions: dict[str, list[str]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            versions.setdefault(name, []).append(version)
    packages = ", ".join(f"{name} {_join(each, ' and ')}" for name, each in versions.items() if name != "kvjax")
    commits = list(dict.fromkeys(str(row["git"]) for row in rows))
    return f"Device: {devices}; {packages}; {'commits' if len(commits) > 1 else 'commit'} {', '.join(commits)}."


def _join(names: Iterable[str], between: str) -> str:
    return between.join(dict.fromkeys(names))


def check_clean(file: str, rows: Sequence[Row]) -> None:
    """Refuses rows that no commit reproduces.

    Args:
      file: the rows' file, for the message.
      rows: the rows.

    Raises:
      KvjaxError: rows were measured outside a checkout, or where files differed from the commit.
    """
    dirty = [number for number, row in enumerate(rows, 1) if not row["git"] or row["git"].endswith("+")]
    if dirty:
        some = ", ".join(map(str, dirty[:8])) + ", …" * (len(dirty) > 8)
        raise KvjaxError(f"dirty rows: {file}: {len(dirty)} of {len(rows)} (lines {some}); expected rows of a commit")
