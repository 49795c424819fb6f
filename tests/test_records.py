"""Result rows: numbers that JSON does not know, and what describes the machine."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from pathlib import Path

import jax
import pytest

from kvjax.records import append_row, commit_of, describe_cpu, provenance, read_rows

EPYC = """processor\t: 0
model\t\t: 1
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse2 avx avx2 sha_ni

processor\t: 1
model\t\t: 1
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse2 avx avx2 sha_ni
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    "text,says",
    [
        (EPYC, "AMD EPYC 7B13, avx2"),
        (EPYC.replace("avx2", "avx2 avx512f"), "AMD EPYC 7B13, avx512"),
        (EPYC.replace("avx2", "avx2 avx512f amx_tile"), "AMD EPYC 7B13, amx"),
        ("model name : Intel(R)  Xeon(R) CPU @ 2.20GHz\nflags : fpu mmx\n", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
        (ARM, f"{platform.machine()}, sve"),
        (ARM.replace(" sve", ""), f"{platform.machine()}, neon"),
        ("", ""),
    ],
)
def test_a_cpu_is_named_by_its_model_and_vector_unit(text: str, says: str) -> None:
    assert describe_cpu(text) == says


def test_the_device_says_more_than_cpu() -> None:
    device = provenance()["device"]
    assert device.endswith(" cores") and not device.startswith("cpu")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_the_device_names_the_limit_on_its_instructions(monkeypatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert " held to AVX2, " in provenance()["device"]


def test_rows_are_strict_json_and_come_back(tmp_path: Path) -> None:
    file, row = (
        tmp_path / "rows.jsonl",
        {"ppl": math.inf, "low": -math.inf, "list": [1.5, {"a": math.inf}], "no": None},
    )
    append_row(file, row | {"nll_se": math.nan})
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (found,) = read_rows(file)
    assert math.isnan(found.pop("nll_se")) and found == row


def test_rows_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"nll_se": NaN, "ppl": Infinity}\n')
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert math.isnan(row["nll_se"]) and row["ppl"] == math.inf


def test_only_a_tracked_file_has_a_commit(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    own, foreign = tmp_path / "own.py", tmp_path / "venv/lib/records.py"
    foreign.parent.mkdir(parents=True)
    for file in (own, foreign):
        file.write_text("x = 1\n")
    assert commit_of(own) is None  # no repository
    git("init", "-q")
    git("add", "own.py")
    git("commit", "-qm", "first")
    assert commit_of(foreign) is None  # a site-packages inside somebody's repository
    commit_of.cache_clear()
    assert commit_of(own) == git("rev-parse", "--short", "HEAD").strip()
    own.write_text("x = 2\n")
    commit_of.cache_clear()
    assert str(commit_of(own)).endswith("+")
