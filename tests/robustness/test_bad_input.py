"""Bad input ends with one clear line and nothing half-written: some of the cases of `tests.robustness.bad_input`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.robustness.bad_input import CASES, Case, attempt

from kvjax import records
from kvjax.errors import KvjaxError
from kvjax.experiments.pages import bad_inputs
from kvjax.files import write_atomically

ROOT = Path(__file__).parents[2]
SOME = (
    "an unknown config field",
    "a word for a number",
    "no workdir",
    "a workdir that is a file",
    "a bit width that is not packed",
    "a fetched model that is damaged, without a network",
    "NaN in the weights",
    "a state of another model",
    "a damaged journal",
    "a full disk at the first windows",
    "a full disk at a row",
    "a full disk at a state",
    "a full disk at a journal",
)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SOME], ids=lambda case: case.name)
def test_one_line_and_nothing_half_written(case: Case, tmp_path: Path, goldens: Path) -> None:
    result = attempt(case, tmp_path, goldens, seconds=120.0)
    assert result["faults"] == [] and result["exit"] == 2, result


def test_every_case_is_there_and_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert set(SOME) <= set(names) and len(set(names)) == len(names)


def test_faults_are_noticed(tmp_path: Path, goldens: Path) -> None:
    case = Case("nothing bad", "error", "perplexity", ("--help",))
    faults = attempt(case, tmp_path, goldens, seconds=120.0)["faults"]
    assert len(faults) == 3 and faults[0].startswith("exit code") and faults[2].startswith("the line does not hold")


def test_committed_rows_are_of_these_cases() -> None:
    rows = records.read_rows(ROOT / "results/bad_input.jsonl")
    assert [row["input"] for row in rows] == [case.name for case in CASES]
    assert not any(row["faults"] for row in rows)
    assert (ROOT / "docs/bad_inputs.md").read_text(encoding="utf-8") == bad_inputs(
        rows, records.read_rows(ROOT / "results/fuzz.jsonl")
    )


# ---- result files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.mkdir()  # which no file replaces
    with pytest.raises(KvjaxError, match=r"rows\.jsonl cannot be written"):
        write_atomically(file, b"x")
    assert list(tmp_path.iterdir()) == [file]


def test_rows_are_appended_to_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1, "b": [2]}')  # as an editor may leave it
    records.append_rows(file, [{"a": 3, "b": [4]}, {"a": 3, "b": [5]}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == records.read_rows(file)
    assert records.find_row(file, {"a": 3, "b": [5]}) == {"a": 3, "b": [5]}
    assert records.find_row(file, {"a": 1, "b": [5]}) is None


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "arrays.npz"
    records.save_arrays(file, {"a": np.ones(100)})
    whole = file.read_bytes()
    for data in (b"", whole[:-1], whole[: len(whole) // 2], b"x" + whole[1:], b"PK\x03\x04", b"word"):
        file.write_bytes(data)
        with pytest.raises(KvjaxError, match=r"arrays\.npz is damaged"):
            records.load_arrays(file)
