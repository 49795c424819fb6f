"""Tables of the docs: what they say of their rows, and which rows they refuse."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from kvjax.errors import KvjaxError
from kvjax.experiments import pages
from kvjax.experiments.sources import check_clean, describe_source
from kvjax.records import read_rows

PAGE = "before\n<!-- t -->\nold\n<!-- end -->\nafter\n"


def row(git: str | None, device: str = "A, 2 cores", jax: str = "1") -> dict[str, Any]:
    return {"device": device, "versions": {"python": "3", "kvjax": "0", "jax": jax}, "git": git}


def test_a_source_names_every_commit_device_and_version_once_in_order() -> None:
    rows = [row("b"), row("a", jax="2"), row("b", "B, 4 cores")]
    assert describe_source(rows) == "Device: A, 2 cores; B, 4 cores; python 3, jax 1 and 2; commits b, a."
    assert describe_source(rows[:1]) == "Device: A, 2 cores; python 3, jax 1; commit b."


def test_rows_that_no_commit_reproduces_are_refused() -> None:
    check_clean("some.jsonl", [row("a"), row("b")])
    with pytest.raises(KvjaxError, match=r"dirty rows: some.jsonl: 2 of 3 \(lines 2, 3\)"):
        check_clean("some.jsonl", [row("a"), row("b+"), row(None)])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one page, whose tables `t` and `u` have rows of a commit and rows of none."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/t.jsonl").write_text(json.dumps(row("a")) + "\n")
    (tmp_path / "results/u.jsonl").write_text(json.dumps(row("b+")) + "\n")
    (tmp_path / "page.md").write_text(PAGE + PAGE.replace("t -->", "u -->"))
    return tmp_path


def test_a_table_is_written_and_a_refused_one_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {name: (f"{name}.jsonl", describe_source) for name in ("u", "t")}
    monkeypatch.setattr(pages, "TABLES", {"page.md": tables})
    monkeypatch.setattr(pages, "PICTURES", {"p": ("u.jsonl", lambda rows, file: pytest.fail("drawn"))})
    monkeypatch.setattr(pages, "write_bad_inputs", lambda: None)
    with pytest.raises(SystemExit, match=r"^dirty rows: u.jsonl: 1 of 1 \(lines 1\)[^\n]*$"):
        pages.main()
    written = PAGE.replace("old", describe_source([row("a")]))
    assert (root / "page.md").read_text() == written + PAGE.replace("t -->", "u -->")


def test_every_page_has_its_tables_and_every_table_is_made_of_its_rows() -> None:
    for page, tables in pages.TABLES.items():
        text = (pages.ROOT / page).read_text(encoding="utf-8")
        for name, (file, render) in tables.items():
            assert f"<!-- {name} -->\n" in text
            if not file:  # made of the code itself
                assert render([])
            elif rows := read_rows(pages.ROOT / "results" / file):
                assert "\n| --- |" in "\n" + render(rows)


def test_bits_stand_beside_one_another_where_rows_have_them() -> None:
    figures = {"cache": "xcl2", "bits_asymptotic": 2.7, "bits_real": 3.76, "nll": 3.0, "kld": 0.1, "top1": 0.9}
    rows = [row("a") | figures | {"text": text, "bits_peak": 4.56} for text in ("wikitext-2", "demo")]
    *_, last = pages.xquant(rows).splitlines()
    assert last == "| `xcl2` | 2.70 | 3.76 | 4.56 | 0.1000 | 0.900 | 3.0000 | 0.1000 | 3.0000 |"
    *_, last = pages.xquant([{key: each[key] for key in each if key != "bits_peak"} for each in rows]).splitlines()
    assert last.startswith("| `xcl2` | 2.70 | 3.76 |  | 0.1000 |")


def test_models_stand_beside_one_another() -> None:
    figures = {"bits_asymptotic": 4.25, "kld": 0.1, "top1": 0.9, "nll": 3.0}
    caches = [("one", "dense"), ("one", "k4v4"), ("two", "dense"), ("two", "x4")]
    rows = [row("a") | figures | {"model": model, "cache": cache} for model, cache in caches]
    *_, header, _, dense, kv, x = pages.beside(rows).splitlines()
    assert header.count("|") == 10 and "| one: KL |" in header and "| two: nll |" in header
    cells = " 4.25 | 0.1000 | 0.900 | 3.0000 |"
    assert (dense, kv) == (f"| `dense` |{cells}{cells}", f"| `k4v4` |{cells}  |  |  |  |")
    assert x == f"| `x4` |  |  |  |  |{cells}"


def test_forms_stand_beside_their_plain_one() -> None:
    """A star only where the interval of the difference leaves out 0; what was not run is an empty cell."""
    shared = row("a") | {"text": "demo", "windows": 4, "context": 64, "family": "KIVI", "plain": "k4v4@kivi"}
    shared |= {"condition": "exact", "protocol": "streaming", "bits": 4, "kld": 0.1}
    told = {"kld_over_plain": 0.5, "kld_less_plain": -0.1, "kld_less_plain_ci95": 0.02}
    rows = [
        shared | {"form": "", "cache": "k4v4@kivi"},
        shared | {"form": "fit=keys", "cache": "k4v4@kivi(fit=keys)", "kld": 0.05} | told,
        shared
        | {"form": "fit=mse", "cache": "k4v4@kivi(fit=mse)", "kld": 0.05}
        | told
        | {"kld_less_plain_ci95": 0.2},
        shared | {"form": "", "cache": "k2v2@kivi", "plain": "k2v2@kivi", "bits": 2, "kld": 0.7},
    ]
    *_, header, _, plain, keys, mse = pages.at_equal_conditions(rows).splitlines()
    assert header == "| family and form | exact, 4 bits | exact, 2 bits |"
    assert plain == "| KIVI | 0.1000 | 0.7000 |"
    assert keys == "| KIVI: `fit=keys` | 0.0500 (× 0.50*) |  |"
    assert mse == "| KIVI: `fit=mse` | 0.0500 (× 0.50) |  |"


def test_a_page_of_a_method_has_its_rows_alone() -> None:
    figures = {"bits_asymptotic": 4.25, "kld": 0.1, "top1": 0.9, "nll": 3.0, "text": "wikitext-2"}
    names = [("dense", "float32"), ("x4@latent", "float32"), ("xcl4@latent", "float32"), ("x4@latent", "float64")]
    rows = [row("a") | figures | {"cache": cache, "dtype": dtype} for cache, dtype in names]
    rows.append(rows[1] | {"text": "demo"})
    *_, dense, x = pages.only(pages.brief, "dense", "x?@*", dtype="float32")(rows).splitlines()
    assert (dense, x) == tuple(f"| `{name}` | 4.25 | 0.1000 | 0.900 | 3.0000 |" for name in ("dense", "x4@latent"))


def test_a_missing_result_file_is_named(root: Path) -> None:
    with pytest.raises(KvjaxError, match=r"no rows: v\.jsonl"):
        pages.clean_rows("v.jsonl")
    (root / "results/v.jsonl").write_text("")
    with pytest.raises(KvjaxError, match=r"no rows: v\.jsonl"):
        pages.clean_rows("v.jsonl")


def test_the_pages_are_those_of_the_clone_by_the_link_too() -> None:
    root = Path(__file__).parents[2]
    assert root == pages.ROOT and runpy.run_path(str(root / "experiments/pages.py"))["ROOT"] == root


def test_tasks_stand_in_a_table_for_each_model() -> None:
    def asked(model: str, cache: str, metric: str, value: float) -> dict[str, Any]:
        figures = {"part": "needle", "metric": metric, "value": value, "stderr": 0.125, "samples": 20}
        return row("a") | figures | {"model": model, "cache": cache, "bits_asymptotic": 5.0}

    rows = [asked("one", "k4v4", "found", 0.5), asked("two", "k4v4", "found", 1.0), asked("two", "k2v2", "lost", 0.0)]
    _, one, first, two, second = pages.tasks(rows).split("\n\n")
    assert one == "one, ± one standard error; samples: 20 of `needle`." and two.startswith("two")
    assert first.splitlines()[2:] == ["| `k4v4` | 5.00 | 0.50 ± 0.12 |"]
    assert second.splitlines()[2:] == ["| `k4v4` | 5.00 | 1.00 ± 0.12 |  |", "| `k2v2` | 5.00 |  | 0.00 ± 0.12 |"]


def test_parts_of_windows_are_columns() -> None:
    shared = row("a") | {"model": "m", "text": "t", "windows": 2, "context": 9, "nll_increase": 0.5, "kld_se": 0.1}
    rows = [shared | {"cache": "k4v4", "first": at, "last": at + 3, "kld": at / 8} for at in (1, 5)]
    source, _, *lines = pages.by_position(rows).splitlines()
    assert source.endswith("m, 2 × 9 tokens of t, ± one standard error.")
    assert lines[0] == "| cache | figure | 1 to 4 | 5 to 8 |"
    assert lines[2:] == [
        "| `k4v4` | KL | 0.1250 ± 0.1000 | 0.6250 ± 0.1000 |",
        "| `k4v4` | nll, more | 0.5000 | 0.5000 |",
    ]
