"""What every program shares: flags, one clear line for bad input, and result files that survive a kill."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import config_dict, config_flags

from kvjax.errors import KvjaxError
from kvjax.files import brief, write_atomically

ROOT = Path(__file__).parent.parent
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results and partial work.")


def run(main: Callable[[config_dict.ConfigDict, Path], None], config_file: str) -> None:
    """Parses --config and --workdir and runs `main(config, workdir)`, which appends to result files in workdir.

    Bad input (an unknown flag, field or value, or a KvjaxError) prints one line and exits with 2.
    """

    def needs_folder(config: config_dict.ConfigDict, workdir: Path | None) -> None:
        if workdir is None:
            raise KvjaxError("no --workdir; expected a folder for results")
        main(config, workdir)

    run_anywhere(needs_folder, config_file)


def run_anywhere(main: Callable[[config_dict.ConfigDict, Path | None], None], config_file: str) -> None:
    """`run` for a program that may go without a workdir."""

    def guarded(_: list[str]) -> None:
        _hush()
        workdir = Path(_WORKDIR.value) if _WORKDIR.value else None
        try:
            if workdir is not None:
                _make_folder(workdir)
            main(flags.FLAGS.config, workdir)
        except KvjaxError as error:
            _fail(str(error))
        except OSError as error:
            _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=functools.partial(_parse, ROOT / config_file))


def _parse(config_file: Path, argv: list[str]) -> list[str]:
    """Defines and parses the flags, so that all that is wrong with them is said here."""
    fields = list(runpy.run_path(str(config_file))["get_config"]().keys())
    expected = f"this program's fields are {', '.join(fields)}"
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and match[1] not in fields:
            _fail(f"unknown config field {match[1]!r}; {expected}")
    try:
        config_flags.DEFINE_config_file("config", str(config_file), "The study's config.", lock_config=True)
        rest = flags.FLAGS(argv)
        fits = all(field in flags.FLAGS.config for field in fields)
    except (KeyError, AttributeError):
        fits = False
    except (flags.Error, TypeError, ValueError, OSError, SyntaxError) as error:
        _fail(" ".join(str(error).split()))
    if not fits:
        _fail(f"--config is the config of another program; {expected}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; fields are set as --config.field=value")
    return rest


def _hush() -> None:
    """What Orbax raises, its loggers, its event loop and its storage's threads also tell in pages."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise KvjaxError(f"{folder} is a file; expected a folder for results")
    folder.mkdir(parents=True, exist_ok=True)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def save_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    write_atomically(file, buffer.getvalue())


def load_arrays(file: Path) -> dict[str, Any]:
    """What `save_arrays` wrote. Raises KvjaxError where it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # numpy and its readers raise many kinds
        raise KvjaxError(f"{file} is damaged ({brief(error)}); remove it to compute it again") from None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file, none where there is no file."""
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
        rows.append(row)
    return rows


def find_row(file: Path, point: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first row of a results file that has all values of `point`: what is measured already."""
    return next((row for row in read_rows(file) if point.items() <= row.items()), None)


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    append_rows(file, [row])


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends all rows or, where that fails or is killed, none."""
    old = file.read_bytes() if file.exists() else b""
    end = b"\n" if old and not old.endswith(b"\n") else b""  # an editor may have left out the last newline
    write_atomically(file, old + end + _lines(rows))


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a file by these rows."""
    write_atomically(file, _lines(rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def provenance() -> dict[str, Any]:
    """Where a row comes from: device, versions, commit."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"cpu, {os.cpu_count()} cores"
    packages = ("kvjax", "jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"device": kind, "versions": {"python": platform.python_version(), **versions}, "git": _commit()}


@functools.cache  # two processes a call, and the code that runs is that of the start
def _commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    git = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class CompileSeconds:
    """Seconds of tracing, lowering and compiling from here on."""

    def __init__(self) -> None:
        self._seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._seconds += duration_secs

    def total(self) -> float:
        return self._seconds
