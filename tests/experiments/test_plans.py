"""Searched plans judged on texts that the search never saw, on a tiny model."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import config_dict

import kvjax
from kvjax.configs.plans import get_config
from kvjax.experiments import plans
from kvjax.records import read_rows

SIZES: dict[str, Any] = {"context": 48, "windows": 1, "judged_windows": 3, "budgets": "5", "points": 2}


def write_text(file: Path, seed: int) -> Path:
    letters = np.random.default_rng(seed).choice(list(string.ascii_lowercase + " "), 1200)
    file.write_text("".join(letters))
    return file


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> config_dict.ConfigDict:
    folder = tmp_path_factory.mktemp("texts")
    calibrated, judged = (write_text(folder / f"{seed}.txt", seed) for seed in range(2))
    config = get_config()
    config.update(SIZES, model=str(goldens / "llama-linear"), text=str(calibrated), judged_on=str(judged))
    config.searches = config_dict.ConfigDict({"token": {"candidates": "k8v8@token,k2v2@token"}})
    return config


def test_intervals_are_paired_and_over_windows(config: config_dict.ConfigDict, tmp_path: Path) -> None:
    plans.main(config, tmp_path)
    rows = read_rows(tmp_path / "plans.jsonl")
    assert (tmp_path / "plans.png").exists()
    assert {row["kind"] for row in rows} == {"searched", "uniform"}
    model = kvjax.load(config.model, config.dtype)
    sizes = {"context": config.context, "windows": config.judged_windows}
    searched, uniform = (next(row for row in rows if row["kind"] == kind) for kind in ("searched", "uniform"))
    scores = [kvjax.score(model, Path(config.judged_on), row["cache"], **sizes) for row in (uniform, searched)]
    paired = scores[0].compare(scores[1])
    assert uniform["better_by"] == pytest.approx(paired.kld, rel=1e-3) and paired.kld > 0
    assert uniform["ci95"] == pytest.approx(paired.kld_interval, rel=1e-3)
    assert (searched["first_search"], searched["gain"], searched["gain_ci95"]) == ("token", 0, 0)
    assert uniform["bits_peak"] == uniform["bits_real"] > uniform["bits_nominal"]


@pytest.mark.parametrize("same", ["the name", "the tokens"])
def test_a_text_that_was_calibrated_on_is_not_judged(
    same: str, config: config_dict.ConfigDict, tmp_path: Path
) -> None:
    own = config_dict.ConfigDict(config.to_dict())
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(config.text).read_text())
    own.judged_on = f"{own.judged_on},{own.text if same == 'the name' else copy}"
    with pytest.raises(kvjax.KvjaxError, match=r"is both calibrated on|share 34 runs of 32 tokens"):
        plans.main(own, tmp_path / "out")
    assert not (tmp_path / "out/plans.jsonl").exists()
