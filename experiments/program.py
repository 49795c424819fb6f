"""What every program shares: flags, one clear line for bad input, and result files that survive a kill."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from kvjax.errors import KvjaxError

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
    config = config_flags.DEFINE_config_file("config", config_file, "The study's config.", lock_config=True)

    def guarded(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        workdir = Path(_WORKDIR.value) if _WORKDIR.value else None
        try:
            if workdir is not None:
                workdir.mkdir(parents=True, exist_ok=True)
            main(config.value, workdir)
        except KvjaxError as error:
            _fail(str(error))
        except OSError as error:
            _fail(f"{error.filename or workdir}: {error.strerror}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (KeyError, AttributeError) as error:
        _fail(f"unknown config field {error}; expected one that the config file names")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; fields are set as --config.field=value")
    return rest


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def write_atomically(file: Path, data: bytes) -> None:
    """Writes to a temporary name beside `file` and renames it: a kill leaves the old file or the new one."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(file)


def save_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())


def load_arrays(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


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


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    old = file.read_bytes() if file.exists() else b""
    write_atomically(file, old + json.dumps(row).encode() + b"\n")


def provenance() -> dict[str, Any]:
    """Where a row comes from: device, versions, commit."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"cpu, {os.cpu_count()} cores"
    packages = ("kvjax", "jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"device": kind, "versions": {"python": platform.python_version(), **versions}, "git": _commit()}


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
