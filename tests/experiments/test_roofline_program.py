"""The program that computes least times: its rows, its picture, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvjax.configs import roofline as study
from kvjax.errors import KvjaxError
from kvjax.experiments import pages, roofline
from kvjax.records import read_rows


def test_rows_a_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.get_config("gqa")
    config.update(devices="v6e,h100", caches="dense,x4@latent,x4@head", contexts="1024,8192,32768,131072", batch=4)
    for _ in range(2):  # what is there already is left out
        roofline.main(config, tmp_path)
    rows = read_rows(tmp_path / "roofline.jsonl")
    assert [(row["on"], row["cache"]) for row in rows[:3]] == [("v6e", c) for c in ("dense", "x4@latent", "x4@head")]
    assert len(rows) == 6 and (tmp_path / "roofline.png").stat().st_size > 5_000
    assert "560 operations per byte" in capsys.readouterr().out
    on_h100 = rows[3:]
    assert roofline.fastest(on_h100, 1024) == "dense"  # no bases to read
    assert roofline.fastest(on_h100, 32768) == "x4@head"
    assert not roofline.fits(on_h100[0], 131072)
    lines = pages.roofline(rows).splitlines()
    dense, _, head = lines[-3:]
    assert dense.split(" | ")[2].startswith("**") and dense.split(" | ")[5].startswith("(")
    assert head.split(" | ")[4].startswith("**")


def test_contexts_are_whole_numbers(tmp_path: Path) -> None:
    config = study.get_config("mha")
    config.contexts = "1024,many"
    with pytest.raises(KvjaxError, match=r"contexts=1024,many: expected whole numbers"):
        roofline.main(config, tmp_path)
