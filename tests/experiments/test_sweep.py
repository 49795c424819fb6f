"""The sweep as a user runs it, on a tiny model."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sweep(environment: Mapping[str, str], workdir: Path, *fields: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "experiments.perplexity",
        "--config=configs/perplexity.py",
        f"--workdir={workdir}",
    ]
    command += [f"--config.{field}" for field in fields]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return file


@pytest.fixture(scope="module")
def fields(text: Path) -> list[str]:
    model = ROOT / "tests/goldens/qwen3"
    return [
        f"model={model}",
        f"text={text}",
        "caches=dense,0:k8v8@token;1:k2v2@kivi(group=8),k4v4",
        "context=48",
        "windows=5",
    ]


def test_rows_table_picture_and_resume(
    tmp_path: Path, fields: list[str], keeping_programs: Mapping[str, str]
) -> None:
    run = functools.partial(sweep, keeping_programs, tmp_path, *fields)
    first = run()
    assert first.returncode == 0, first.stderr
    results = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    names = ["dense", "0:k8v8@token;1:k2v2@kivi(group=8)", "k4v4@kivi"]
    assert [row["cache"] for row in rows] == names
    assert all(name[:12] in first.stdout for name in names) and max(map(len, first.stdout.splitlines()[1:-2])) <= 80
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    dense, mixed, uniform = rows
    assert (
        dense["kld"] == 0
        and dense["top1"] == 1
        and dense["compression"] == 1
        and dense["bits_real"] == dense["bits_peak"] == 16
    )
    assert dense["tokens"] == 5 * 47 and uniform["kld"] > 0 and mixed["kld"] > 0
    assert mixed["bits_nominal"] == pytest.approx((8 + 2) / 2)
    assert {"device", "versions", "git", "seconds", "compile_seconds", "nll_se", "kld_p99"} <= set(mixed)

    before = results.read_bytes()
    again = run()
    assert again.returncode == 0 and results.read_bytes() == before

    # A row lost with its run is made again from the windows on disk, to the last digit; nothing is doubled.
    results.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert run().returncode == 0
    remade = [json.loads(line) for line in results.read_text().splitlines()]
    assert remade[:2] == rows[:2] and remade[2]["nll"] == uniform["nll"] and len(remade) == 3
    assert remade[2]["seconds"] == uniform["seconds"]  # of the run that computed it
