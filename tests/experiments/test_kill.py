"""The sweep, killed at random moments and started again, ends with the rows of a run that nothing stopped."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Command(NamedTuple):
    words: list[str]
    environment: Mapping[str, str]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, keeping_programs: Mapping[str, str]) -> Command:
    """A sweep of three caches whose every window is a file of its own."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 10)
    fields = f"model=tests/goldens/llama-linear text={text} protocol=parallel context=24 windows=8"
    caches = "caches=dense,k4v4@token,0:k8v8@token;1:k2v2@kivi"
    python = [sys.executable, "-m", "kvjax.experiments.perplexity", "--config=configs/perplexity.py"]
    return Command([*python, *(f"--config.{field}" for field in (*fields.split(), caches))], keeping_programs)


@pytest.fixture(scope="module")
def uninterrupted(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], float]:
    """The rows of a run that nothing stops, and the seconds that it takes with its programs compiled already."""
    compiling, workdir = (tmp_path_factory.mktemp(name) for name in ("compiling", "whole"))
    finish(command, compiling)
    begun = time.perf_counter()
    finish(command, workdir)
    seconds, rows = time.perf_counter() - begun, figures(workdir)
    assert len(rows) == 3 and rows == figures(compiling)
    return rows, seconds


@contextlib.contextmanager
def started(command: Command, workdir: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*command.words, f"--workdir={workdir}"],
        cwd=ROOT,
        env=command.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(command: Command, workdir: Path) -> None:
    with started(command, workdir) as process:
        errors = process.communicate()[1]
    assert process.returncode == 0, errors


def wait(process: subprocess.Popen[str], workdir: Path, enough: Callable[[float, int], bool]) -> None:
    """Until `enough(seconds, files written)` since the call, or until the process has ended."""
    begun, before, written = time.perf_counter(), files(workdir), 0
    while process.poll() is None and not enough(time.perf_counter() - begun, written):
        time.sleep(0.001)
        after = files(workdir)
        written, before = written + len(after - before), after


def files(folder: Path) -> set[tuple[Path, int]]:
    found = set()
    for file in folder.rglob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # renamed since
            found.add((file, file.stat().st_mtime_ns))
    return found


def figures(workdir: Path) -> list[dict[str, Any]]:
    """The rows without what differs from run to run; every line must be whole."""
    results = workdir / "results.jsonl"
    text = results.read_text() if results.exists() else ""
    assert not text or text.endswith("\n")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "compile_seconds", "git")} for row in rows]


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.weekly)])
def test_killed_at_random_moments(
    command: Command, uninterrupted: tuple[list[dict[str, Any]], float], tmp_path: Path, kills: int
) -> None:
    whole, seconds = uninterrupted
    rng, ended = random.Random(0), []
    for kill in range(kills):
        delay, count = rng.uniform(0.3, 0.8) * seconds, rng.randint(1, 8)
        with started(command, tmp_path) as process:
            wait(process, tmp_path, lambda s, n, by=(delay, count), k=kill: n >= by[1] if k % 2 == 0 else s >= by[0])
            process.kill()
            process.communicate()
        ended.append(process.returncode)
        rows = figures(tmp_path)
        assert rows == whole[: len(rows)]
    assert ended.count(-signal.SIGKILL) >= 2, ended
    finish(command, tmp_path)
    assert figures(tmp_path) == whole
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_interrupted_by_the_user(
    command: Command, uninterrupted: tuple[list[dict[str, Any]], float], tmp_path: Path
) -> None:
    # A job in the background ignores SIGINT, and so would its children.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with started(command, tmp_path) as process:
            wait(process, tmp_path, lambda _, written: written >= 5)
            process.send_signal(signal.SIGINT)
            errors = process.communicate()[1]
    finally:
        signal.signal(signal.SIGINT, old)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert not [file for file, _ in files(tmp_path) if file.name.startswith(".")]
    finish(command, tmp_path)
    assert figures(tmp_path) == uninterrupted[0]
