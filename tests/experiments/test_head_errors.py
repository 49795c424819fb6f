"""Errors of heads: the program's rows, and what its tables say of rows that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvjax.configs import head_errors as study
from kvjax.experiments import head_errors, pages
from kvjax.records import read_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


def row(cache: str, e_o: list[list[float]], **more: Any) -> dict[str, Any]:
    errors = {"e_k": [[0.1], [0.3]], "e_v": [[0.2], [0.2]], "e_a": [[1e-4, 4e-4], [3e-4, 2e-4]], "e_o": e_o}
    return {"cache": cache, "kld": 0.5, "nll": 2.0, **errors, **more}


MADE_UP = [
    {"cache": "dense", "kld": 0.0, "nll": 1.0, "largest_weight": [[0.1, 0.2], [0.3, 0.4]]},
    row("k4v8@kivi", [[0.4, 0.3], [0.2, 0.1]]),  # falls with the weight
    row("k8v4@kivi", [[0.1, 0.2], [0.25, 0.45]]),  # grows with it
]


def test_keys_alone_are_compared_with_values_alone_head_by_head() -> None:
    assert head_errors.key_lines(MADE_UP) == [
        ["kivi", "4", "0.250", "0.250", "50% of heads", "0.20", "-1.00", "1.00", "0.0, 0.1, 1.0, 1.1"]
    ]


def test_a_pairs_errors_are_means_over_layers_and_heads() -> None:
    dense, keys, _ = head_errors.pair_lines(MADE_UP)
    assert dense == ["dense", "", "", "", "", "0.0000", "2.72"]
    assert keys == ["k4v8@kivi", "0.2000", "0.2000", "2.50e-04", "0.2500", "0.5000", "7.39"]


def test_a_row_per_cache_once(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.get_config()
    config.update(model=str(goldens / "llama-linear"), caches="k4v8@kivi,k8v4@kivi", context=48)
    head_errors.main(config, tmp_path)
    rows = read_rows(tmp_path / "head_errors.jsonl")
    assert [each["cache"] for each in rows] == ["dense", "k4v8@kivi", "k8v4@kivi"]
    heads = len(rows[0]["largest_weight"][0])
    assert [len(layer) for layer in rows[1]["e_o"]] == [heads] * len(rows[0]["largest_weight"])
    assert rows[1]["kld"] > 100 * abs(rows[0]["kld"]) and "| `k4v8@kivi` |" in pages.pairs(rows)
    head_errors.main(config, tmp_path)  # what is there already is left out
    assert read_rows(tmp_path / "head_errors.jsonl") == rows
    assert "keys cost more in" in capsys.readouterr().out
