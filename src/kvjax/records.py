"""Result rows and arrays on disk, written completely or not at all, and the provenance of rows."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.errors import KvjaxError
from kvjax.files import brief, write_atomically
from pallas_kernels import native

NOT_IN_JSON = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
VECTOR_UNITS = {  # by the kernel's flag, the best first
    "amx_tile": "amx",
    "avx512f": "avx512",
    "avx2": "avx2",
    "avx": "avx",
    "sse2": "sse2",
    "sve2": "sve2",
    "sve": "sve",
    "asimd": "neon",
    "neon": "neon",
}


def save_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays to a file.

    Args:
      file: an .npz file, replaced where it exists.
      arrays: the arrays by name.

    Raises:
      KvjaxError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    write_atomically(file, buffer.getvalue())


def load_arrays(file: Path) -> dict[str, Any]:
    """Reads the arrays that `save_arrays` wrote.

    Args:
      file: the file.

    Returns:
      The arrays by name.

    Raises:
      KvjaxError: the file is damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # numpy and its readers raise many kinds
        raise KvjaxError(f"{file} is damaged ({brief(error)}); remove it to compute it again") from None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a results file.

    Args:
      file: a file with one JSON object per line.

    Returns:
      The rows; none where there is no file. Numbers that JSON does not know come back, see `write_rows`.

    Raises:
      KvjaxError: a line is not a JSON object.
    """
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise KvjaxError(f"{file}, line {number}: expected a JSON row; mend the file or name another")
        rows.append(_unspell(row))
    return rows


def find_rows(file: Path, point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Finds the rows of a point that is measured already.

    Args:
      file: the results file.
      point: values that identify the point.

    Returns:
      The rows that have all values of `point`.

    Raises:
      KvjaxError: a line of the file is not a JSON object.
    """
    return [row for row in read_rows(file) if point.items() <= row.items()]


def find_row(file: Path, point: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first of `find_rows`; None where there is none."""
    return next(iter(find_rows(file, point)), None)


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Appends one row to a results file.

    Args:
      file: the results file.
      row: the row.

    Raises:
      KvjaxError: the file cannot be written.
    """
    append_rows(file, [row])


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a results file: all of them or, on a failure or kill, none.

    Args:
      file: the results file.
      rows: the rows.

    Raises:
      KvjaxError: the file cannot be written.
    """
    old = file.read_bytes() if file.exists() else b""
    end = b"\n" if old and not old.endswith(b"\n") else b""  # an editor may have left out the last newline
    write_atomically(file, old + end + _lines(rows))


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a results file.

    JSON knows no infinities and no NaN: they are written as the strings "Infinity", "-Infinity" and "NaN".

    Args:
      file: the results file.
      rows: the new rows.

    Raises:
      KvjaxError: the file cannot be written.
    """
    write_atomically(file, _lines(rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(_spell(row), allow_nan=False).encode() + b"\n" for row in rows)


def _spell(value: Any) -> Any:
    """The value with numbers that JSON does not know as strings."""
    if isinstance(value, Mapping):
        return {key: _spell(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in NOT_IN_JSON.items() if str(number) == str(float(value)))
    return value


def _unspell(value: Any) -> Any:
    """What `_spell` was given."""
    if isinstance(value, dict):
        return {key: _unspell(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_unspell(each) for each in value]
    return NOT_IN_JSON.get(value, value) if isinstance(value, str) else value


def provenance() -> dict[str, Any]:
    """Describes where a row comes from.

    Returns:
      The device (of a CPU: model, vector unit, the limit on its instructions where there is one, and cores), the
      versions of packages and the commit of the checkout.
    """
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{_cpu()}, {os.cpu_count()} cores"
    packages = ("kvjax", "jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions = {"python": platform.python_version(), **versions}
    return {"device": kind, "versions": versions, "git": commit_of(Path(__file__))}


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    name = describe_cpu(file.read_text() if file.exists() else "") or platform.processor() or platform.machine()
    limit = native.instruction_limit()
    return f"{name} held to {limit}" if limit else name


def describe_cpu(cpuinfo: str) -> str:
    """Names a CPU's model and its best vector unit, as in "AMD EPYC 7B13, avx2".

    Args:
      cpuinfo: the text of Linux' /proc/cpuinfo.

    Returns:
      The two, each where the text has it (the machine's architecture in place of a model); "" of an empty text.
    """
    fields: dict[str, str] = dict(re.findall(r"^([^:\n]*?)[ \t]*:[ \t]*(.*?)[ \t]*$", cpuinfo, re.MULTILINE))
    model = " ".join(fields.get("model name", platform.machine()).split())  # ARM's kernels name no model
    flags = fields.get("flags", fields.get("Features", "")).split()
    unit = next((name for flag, name in VECTOR_UNITS.items() if flag in flags), "")
    return ", ".join(filter(None, (model, unit))) if fields else ""


@functools.cache  # a call starts three processes, and the code in memory is that of the start anyway
def commit_of(file: Path) -> str | None:
    """The commit of the checkout that a file belongs to, with a + where files differ from the commit.

    Args:
      file: of the package.

    Returns:
      None where git does not track the file: outside a checkout, or installed into a folder of another project's.
    """

    def git(*args: str) -> str:
        command = ["git", *args]
        return subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class CompileSeconds:
    """A clock for the seconds that JAX spends on tracing, lowering and compiling, from its creation on."""

    def __init__(self) -> None:
        self._seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._seconds += duration_secs

    def total(self) -> float:
        return self._seconds
