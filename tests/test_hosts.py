"""Two processes on one machine, what two_processes.py says of them, and programs that SIGTERM ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvjax import hosts
from kvjax.errors import KvjaxError

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "goldens" / "llama-llama3"
TEXT = "the quick brown fox jumps over the lazy dog. " * 10
PLANS = ["dense", "k4v4@token"]
CONTEXT, WINDOWS = 24, 8
CHECKS = ("exchanges", "refused", "sweep", "saved and restored", "states", "over plans", "tuned")


def figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    return [{key: row[key] for key in row if key not in ("seconds", "compile_seconds", "git")} for row in rows]


def address() -> str:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def started(words: Sequence[Sequence[str]], environment: Mapping[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with one device each, and programs that compile far sooner."""
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    how: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how["env"] = {**environment, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [subprocess.Popen([sys.executable, "-m", *each], **how) for each in words]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                pipe.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def said(folder: Path, keeping_programs: Mapping[str, str]) -> list[dict[str, str]]:
    """What each check says, in each process; its errors under ""."""
    where = address()
    with started([["tests.two_processes", where, str(i), str(folder)] for i in range(2)], keeping_programs) as both:
        told = [process.communicate(timeout=400) for process in both]
    found = []
    for out, errors in told:
        lines = dict(line.split("\t", 1)[::-1] for line in out.splitlines() if "\t" in line)
        found.append(lines | {"": errors[-3000:]})
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, said: list[dict[str, str]]) -> None:
    for found in said:
        assert found.get(name) == "equal", found.get(name, "no answer") + "\n" + found[""]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.weekly)])
def test_one_is_terminated_and_both_start_again(
    victim: int, said: list[dict[str, str]], folder: Path, tmp_path: Path, keeping_programs: Mapping[str, str]
) -> None:
    assert said[0].get("sweep") == "equal"
    whole = [json.loads(line) for line in (folder / "whole" / "results.jsonl").read_text().splitlines()]
    with started(sweep_program(tmp_path), keeping_programs) as processes:
        while len(list(tmp_path.rglob("*.npz"))) < 3 and processes[0].poll() is None:
            time.sleep(0.001)
        processes[victim].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=100)[1] for process in processes]
    assert processes[victim].returncode == 143, told
    assert processes[1 - victim].returncode not in (0, 143), told
    assert not list(tmp_path.rglob(".*"))
    with started(sweep_program(tmp_path), keeping_programs) as processes:
        said_by = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said_by
    assert ["rows: " in out for out, _ in said_by] == [True, False]  # one of them prints
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert figures(rows) == figures(whole)
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def sweep_program(workdir: Path) -> list[list[str]]:
    """The sweep of two_processes.py as a program in two processes."""
    fields = {"model": GOLDEN, "text": TEXT, "caches": ",".join(PLANS), "context": CONTEXT, "windows": WINDOWS}
    fields |= {"dtype": "float32", "mesh": "data=2", "protocol": "parallel"}
    words = [
        "kvjax.experiments.perplexity",
        "--config=configs/perplexity.py",
        f"--workdir={workdir}",
        "--processes=2",
    ]
    words += [f"--config.{name}={value}" for name, value in fields.items()] + [f"--coordinator={address()}"]
    return [[*words, f"--process_id={i}"] for i in range(2)]


def test_sigterm_is_heard_within_a_second() -> None:
    """While Python itself hears nothing: a long call of another language."""
    code = "import hashlib\nfrom kvjax import hosts\nhosts.end_on_sigterm()\nprint('ready', flush=True)\n"
    code += "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # until the long call runs
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "terminated; started again, the run goes on where it was\n"
        assert time.monotonic() - begun < 1
    assert process.returncode == 143


def test_one_process_exchanges_nothing() -> None:
    def fail() -> None:
        raise OSError("as it was")

    assert hosts.on_first(lambda: (1, 2)) == (1, 2) and hosts.on_each(lambda: (1, 2)) == [(1, 2)]
    with pytest.raises(OSError, match="as it was"):
        hosts.on_first(fail)
    assert not hosts.several() and not hosts.tells_of_loss(ValueError("Gloo all-reduce failed"))


def test_processes_that_cannot_be_joined() -> None:
    with pytest.raises(KvjaxError, match="the processes cannot be joined: "):
        hosts.init_distributed()
