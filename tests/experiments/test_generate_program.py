"""The program that generates: what it shows, saves and goes on from; its figures are what they are called."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import kvjax
from kvjax.configs.generate import get_config
from kvjax.experiments import generate
from kvjax.records import read_rows
from kvjax.tables import format_ratio

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(goldens: Path, workdir: Path, **fields: Any) -> list[dict[str, Any]]:
    config = get_config()
    config.update({"model": str(goldens / "llama-linear"), "temperature": 0.9})
    config.update({"prompt": "hello world", **fields})
    generate.main(config, workdir)
    return read_rows(workdir / "generate.jsonl")


def test_save_and_resume_with_the_defaults(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The state has room for what was asked; going on makes more."""
    whole = run(goldens, tmp_path / "whole", max_new_tokens=60)[0]
    text = capsys.readouterr().out
    first = run(goldens, tmp_path / "first", max_new_tokens=40, save=str(tmp_path / "S"))[0]
    rest = run(goldens, tmp_path / "rest", prompt="", max_new_tokens=20, resume=str(tmp_path / "S"))[0]
    assert capsys.readouterr().out.replace("\n", "") == text.replace("\n", "")
    assert (first["tokens"], rest["tokens"]) == (whole["tokens"] - 20, whole["tokens"])
    assert rest["max_len"] > first["max_len"]
    more = run(goldens, tmp_path / "rest", prompt=" and on", max_new_tokens=9, resume=str(tmp_path / "S"))[1]
    with pytest.raises(kvjax.KvjaxError, match="holds a cache of k4v4@kivi; expected k2v2@token"):
        run(goldens, tmp_path / "rest", prompt="", resume=str(tmp_path / "S"), cache="k2v2@token")
    assert more["tokens"] == first["tokens"] + len(" and on") + more["new_tokens"]


@pytest.mark.parametrize("new", [0, 1, 2, 4])
def test_a_few_tokens_are_enough(goldens: Path, tmp_path: Path, new: int) -> None:
    (row,) = run(goldens, tmp_path, max_new_tokens=new, save=str(tmp_path / "S"))
    assert row["new_tokens"] == new and (row["tokens_per_second"] is None) == (new < 2)
    model = kvjax.load(str(goldens / "llama-linear"), "float32")
    assert kvjax.restore_state(tmp_path / "S", model).lengths == [len("hello world") + new]


def test_seconds_are_of_what_they_say(goldens: Path, tmp_path: Path) -> None:
    """Compiling and loading, which take longer than all else here, are in no speed, and in no other plan's row."""
    begun = time.perf_counter()
    first, second = run(goldens, tmp_path, compare="k8v3,k3v8", max_new_tokens=24)
    wall = time.perf_counter() - begun
    assert first["load_seconds"] == second["load_seconds"] < wall / 2
    for row in (first, second):
        assert row["compile_seconds"] > 0.1
        assert row["first_token_seconds"] + 23 / row["tokens_per_second"] < row["compile_seconds"]


def test_a_comparison_says_what_it_rests_on(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """11 tokens and 12 new ones never fill a block of 32: agreement says nothing of the codes."""
    rows = run(goldens, tmp_path, compare="dense,k2v2,0:k2v2@token;1:dense", max_new_tokens=12)
    assert [row["from_codes"] for row in rows] == [0.0, 0.0, 0.5]
    shown = capsys.readouterr()
    table = " ".join(shown.out.replace("│", " ").split())
    assert "larger" in table and "0.5" not in table.partition("smaller")[0]
    assert shown.err.count("none of 23 tokens was read from codes") == 2
    assert "50% of 23 tokens can be read from codes" in shown.err


def test_shares_of_codes() -> None:
    config = kvjax.load("tests/goldens/llama-linear", "float32").config
    share = lambda text, length: kvjax.CachePlan.parse(text, config).coded_share(length)  # noqa: E731
    assert share("k4v4@token", 10) == 1.0 and share("k4v4@token(sink=4)", 10) == 0.6
    assert share("k4v4@kivi", 31) == 0.0 and share("k4v4@kivi", 80) == 0.8
    assert share("k4v4@kivi(sink=8)", 80) == 0.7 and share("dense", 80) == 0.0 and share("x16", 80) == 0.0


def test_ratios_are_never_below_one() -> None:
    assert format_ratio(100, 41) == "2.44 x smaller" and format_ratio(41, 100) == "2.44 x larger"
