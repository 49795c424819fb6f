"""The report of folders: the page, its tables as CSV and LaTeX, and the page in a browser."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvjax.errors import KvjaxError
from kvjax.experiments import report
from kvjax.records import write_rows

Row = dict[str, Any]
HOSTILE = "<script>alert('&')</script> \"quoted\" \\x_{1} 100%"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOURCE = {"device": "A, 2 cores", "versions": {"python": "3", "jax": "1"}, "git": "abc1234"}
RUN = {"model": "m", "dtype": "float32", "text": "t", "protocol": "parallel", "context": 8, "windows": 2, "offset": 0}
MIXED = "0+2:k8v4@kivi;1:x3@latent;3:dense"


def sweep(cache: str, kld: float, bits: float, **more: Any) -> Row:
    figures = {"bits_asymptotic": bits, "bits_nominal": bits - 1, "kld": kld, "kld_se": kld / 7.5, "nll": 3 + kld}
    return {"experiment": "perplexity", **RUN, "cache": cache, **figures, "nll_se": 0.25, **more, **SOURCE}


SWEPT = [
    sweep("dense", 0.0, 16.0),
    sweep("k4v4@kivi", 0.0123456789, 5.0),
    sweep("k2v2@kivi", 1.5, 3.0),
    sweep("k8v8@kivi", 3e-7, 9.0),
    sweep("x2@input", math.inf, 2.5, nll=math.nan),
    sweep(HOSTILE, 0.25, 4.0),
    {"experiment": "perplexity", **RUN, "cache": "x1@input", "error": "out of memory", **SOURCE},
]
TUNED = [
    {"experiment": "other", **RUN, "cache": MIXED, "kld": 0.5, "list": [[1, 2], [3.5]], **SOURCE, "git": "def5678+"},
    {"experiment": "other", **RUN, "cache": "k4v4@kivi", "kld": 0.75, "yes": True, **SOURCE},
]


class Page(HTMLParser):
    """The tables of a page, as rows of cells' texts; the sources of its pictures; its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[str] = []
        self.inside = False
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of rows, with a report of both in the first."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "a & b/results.jsonl", SWEPT)
    write_rows(folder / "second/rows.jsonl", TUNED)
    (folder / "second/extra.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert report.run([str(folder / "a & b"), str(folder / "second")]) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "a & b/report.html").read_text())


def column(table: list[list[str]], name: str) -> list[str]:
    return [row[table[0].index(name)] for row in table[1:]]


def test_the_page_has_every_row_with_the_columns_that_matter_first(page: Page) -> None:
    swept, tuned, _ = page.tables
    assert swept[0][:5] == ["cache", "error", "bits", "with scales", "KL"] and len(swept) == 1 + len(SWEPT)
    assert column(swept, "cache") == [row["cache"] for row in SWEPT]
    assert column(swept, "KL")[1:] == [
        "0.01235 ± 0.0016",
        "1.5 ± 0.2",
        "3e-07 ± 4e-08",
        "∞ ± ∞",
        "0.25 ± 0.033",
        "",
    ]
    assert column(swept, "nll")[4] == "NaN ± 0.25" and column(swept, "error")[-1] == "out of memory"
    assert [tag for tag in page.tags if tag[0] == "tr" and tag[1].get("class") == "failed"] == [
        ("tr", {"class": "failed"})
    ]
    assert column(tuned, "list") == ["3 values, 1 to 3.5", ""] and column(tuned, "yes") == ["", "yes"]


def test_where_figures_come_from_is_stated_once(folder: Path, page: Page) -> None:
    text = (folder / "a & b/report.html").read_text()
    assert text.count("abc1234") == 1 and text.count("def5678+") == 1 and "with changes that no commit holds" in text
    assert "source" not in page.tables[0][0] and column(page.tables[1], "source") == ["2", "1"]
    assert text.count("<dt>protocol</dt>") == 2  # the two tables are of two programs


def test_pictures_are_drawn_anew_and_others_shown(page: Page) -> None:
    assert len(page.images) == 2 and all(src.startswith("data:image/png;base64,iVBORw0KGgo") for src in page.images)
    assert len(page.images[0]) > 20_000 and len(page.images[1]) < 100


def test_plans_have_their_bits_by_layer(page: Page) -> None:
    header, line = page.tables[2]
    assert header == ["plan", "with scales", "KL", "0", "1", "2", "3"]
    assert line[2:] == ["0.5", "84", "x3", "84", "1616"]
    colours = [each["class"] for tag, each in page.tags if tag == "span"]
    assert colours[-7:] == ["b8", "b4", "b3", "b8", "b4", "b16", "b16"]


def test_nothing_is_run_or_asked_from_outside(folder: Path, page: Page) -> None:
    assert HOSTILE in column(page.tables[0], "cache")
    assert [tag for tag, _ in page.tags].count("script") == 1
    text = (folder / "a & b/report.html").read_text()
    assert "<script>alert" not in text and not re.search(r"https?://|url\(|@import", text)
    asked = [each.get(key) or "" for _, each in page.tags for key in ("src", "href") if key in each]
    assert all(link.startswith(("data:", "#", "report-")) for link in asked)
    assert "report-1-a-b-results.csv" in asked and (folder / "a & b/report-1-a-b-results.csv").exists()


def test_csv_gives_the_rows_back(folder: Path) -> None:
    with (folder / "a & b/report-1-a-b-results.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    for row, line in zip(SWEPT, found, strict=True):
        for key, value in row.items():
            if isinstance(value, float):
                assert repr(float(line[key])) == repr(value)
            else:
                assert line[key] == value if isinstance(value, str) else json.loads(line[key]) == value
        assert all(line[key] == "" for key in line if key not in row)


def test_latex_has_the_figures_of_the_page(folder: Path, page: Page) -> None:
    text = (folder / "a & b/report.tex").read_text()
    body = re.findall(r"\\begin{longtable}{(\w+)}\n(.*?)\\end{longtable}", text, re.DOTALL)
    assert len(body) == 2
    for (places, lines), table in zip(body, page.tables, strict=False):
        rows = [
            re.split(r" (?<!\\)& ", line.removesuffix(" \\\\")) for line in lines.replace("\\hline", "").splitlines()
        ]
        for row, shown in zip(rows, table, strict=True):
            assert len(row) == len(places)
            assert [unescaped(cell) for cell in row] == [" ".join(each.split()) for each in shown[: len(row)]]


def unescaped(cell: str) -> str:
    for latex, character in {r"$\infty$": "∞", r"$\pm$": "±", r"$\times$": "×", r"\textbackslash{}": "\\"}.items():
        cell = cell.replace(latex, character)
    return re.sub(r"\\([&%$#_{}])", r"\1", cell)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "expected a folder with"),
        ({}, "has no rows; expected results.jsonl"),
        ({"results.jsonl": ""}, "has no rows; expected results.jsonl"),
        ({"results.jsonl": '{"cache": "dense"}\n{"cache": '}, "line 2: expected a JSON row"),
    ],
    ids=["no folder", "no files", "no rows", "a broken row"],
)
def test_bad_folders_are_refused_in_one_line(
    files: dict[str, str] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert report.run([str(folder), f"--out={tmp_path}/out.html"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not [*tmp_path.glob("out*")]
    with pytest.raises(KvjaxError, match=re.escape(said)):
        report.main([folder], tmp_path / "out.html")


def test_no_folder_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.run([]) == 2
    assert re.fullmatch(r"error: [^\n]*DIR\n", capsys.readouterr().err)


def test_rows_that_cannot_be_drawn_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"experiment": name, "cache": ["odd"], "kld": "many"} for name in report.KINDS]
    write_rows(tmp_path / "results.jsonl", [*rows, {"cache": None}, {}])
    report.main([tmp_path], tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.delitem(sys.modules, "matplotlib.backends.backend_agg", raising=False)
    write_rows(tmp_path / "results.jsonl", SWEPT)
    report.main([tmp_path], tmp_path / "plain.html")
    assert not Page((tmp_path / "plain.html").read_text()).images


# ---- in a browser


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_a_press_on_a_heading_sorts(folder: Path, tmp_path: Path) -> None:
    """KL up, then down: rows without a number stay last, and the console stays empty."""
    press = "document.querySelector('th[title=kld] button').click();"
    text = (folder / "a & b/report.html").read_text()
    orders = []
    for presses in (1, 2):
        file = tmp_path / f"{presses}.html"
        file.write_text(text.replace("</body>", f"<script>{press * presses}</script></body>"))
        after, console = opened(file, tmp_path)
        assert not console
        orders.append(column(Page(after).tables[0], "cache"))
    numbers = sorted((row for row in SWEPT if "kld" in row), key=lambda row: row["kld"])
    up = [row["cache"] for row in numbers]
    assert orders == [[*up, "x1@input"], [*reversed(up), "x1@input"]]


def opened(file: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """A page's document after its scripts, and what they told the console."""
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync disable-extensions"
    flags = [
        f"--{flag}" for flag in ("headless", "no-sandbox", "disable-gpu", *quiet.split(), "enable-logging=stderr")
    ]
    command = [str(BROWSER), *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
