"""The sweep from Python: rows of the program, resumption, progress, nothing left behind, every type of a row."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax.caches.base import ModelSizes
from kvjax.caches.kv import KV
from kvjax.evaluate import sweep as module
from kvjax.evaluate.sweep import Rows

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"protocol": "parallel", "context": 24, "windows": 2}
PLUGIN = """
import dataclasses
from typing import ClassVar
import kvjax
from kvjax.caches.simulated import SimulatedSpec

@kvjax.register
@dataclasses.dataclass(frozen=True)
class Halved(SimulatedSpec):
    form: ClassVar[str] = "halved"
    examples: ClassVar[tuple[str, ...]] = ("halved",)
    bits_nominal: ClassVar[float] = 8.0

    def bits_asymptotic(self, shape):
        return 8.0

    def simulate(self, k, v, real):
        return k / 2, v
"""


@pytest.fixture(scope="module")
def tiny(goldens: Path) -> kvjax.Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 10)
    return file


@pytest.fixture(scope="module")
def swept(tiny: kvjax.Model, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Path]:
    """A sweep's rows and its folder."""
    folder = tmp_path_factory.mktemp("swept")
    return kvjax.sweep(tiny, text, ["dense", "k4v4@token"], folder=folder, **SIZES), folder


def run(program: str, workdir: Path, *fields: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"kvjax.experiments.{program}", f"--config=configs/{program}.py"]
    command += [f"--workdir={workdir}", *(f"--config.{field}" for field in fields)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    return [{key: row[key] for key in row if key not in ("seconds", "compile_seconds")} for row in rows]


def test_rows_are_the_programs_and_plugins_are_scored(swept: tuple[Rows, Path], text: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "halved.py"
    plugin.write_text(PLUGIN)
    model = f"model={ROOT / 'tests/goldens/llama-linear'}"
    sizes = [f"{key}={value}" for key, value in SIZES.items()]
    fields = (model, f"text={text}", *sizes, "caches=dense,k4v4@token,halved", f"plugins={plugin}")
    done = run("perplexity", tmp_path / "out", *fields)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert steady(rows[:2]) == steady(swept[0]) and [list(row) for row in rows[:2]] == [list(r) for r in swept[0]]
    assert rows[2]["cache"] == "halved" and rows[2]["simulated"] and rows[2]["kld"] > 0
    assert not rows[1]["simulated"]


@pytest.mark.parametrize(
    "plugins,says", [("nowhere", "plugin nowhere cannot be imported"), ("json", "plugin json registers no cache")]
)
def test_plugins_that_are_refused(plugins: str, says: str, tmp_path: Path) -> None:
    done = run("perplexity", tmp_path, f"plugins={plugins}")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {says}")


def test_a_sweep_goes_on_where_it_was(
    tiny: kvjax.Model, text: Path, swept: tuple[Rows, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, folder = swept
    before, heard = (folder / "results.jsonl").read_bytes(), []
    monkeypatch.setattr(module.Scorer, "run", lambda *_: pytest.fail("scored again"))
    again = kvjax.sweep(
        tiny, text, "k4v4@token,dense", folder=folder, progress=lambda *call: heard.append(call), **SIZES
    )
    assert again == rows[::-1] and (folder / "results.jsonl").read_bytes() == before
    assert [(str(plan), done, total) for plan, done, total in heard][-1] == ("dense", 2, 2)
    # Rows that are lost are made again from the windows on disk, and so are those of a spec and a plan.
    (folder / "results.jsonl").unlink()
    plan = kvjax.plan(tiny, "dense")
    remade = kvjax.sweep(tiny, text, [plan, KV(4, 4, "token")], folder=folder, **SIZES)
    assert remade == rows and (folder / "results.jsonl").read_bytes() == before


def test_nothing_is_left_without_a_folder(
    tiny: kvjax.Model, text: Path, swept: tuple[Rows, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    heard: list[tuple[int, int]] = []
    rows = kvjax.sweep(tiny, text, kvjax.plan(tiny, "dense"), progress=lambda _, *n: heard.append(n), **SIZES)
    assert steady(rows) == steady(swept[0][:1]) and list(tmp_path.iterdir()) == []
    assert list(dict.fromkeys(heard)) == [(0, 2), (1, 2), (2, 2)]


def test_bfloat16_survives_the_disk(goldens: Path, text: Path) -> None:
    """The dense run is read back from a file, which knows no bfloat16."""
    rows = kvjax.sweep(kvjax.load(str(goldens / "llama-linear"), "bfloat16"), text, "dense,k4v4@token", **SIZES)
    assert rows[0]["dtype"] == "bfloat16" and rows[0]["kld"] == 0 < rows[1]["kld"] < 0.5


@pytest.mark.parametrize(
    "caches,says",
    [("dense,zip", "not known"), ("dense,k4v4@token(group=16)", "divide"), ([], "at least one"), ([3], "type int")],
)
def test_all_plans_are_checked_before_any_is_scored(
    tiny: kvjax.Model, text: Path, caches: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Scorer, "run", lambda *_: pytest.fail("scored"))
    with pytest.raises(kvjax.KvjaxError, match=says):
        kvjax.sweep(tiny, text, caches, **SIZES)


def test_progress_is_something_to_call(tiny: kvjax.Model, text: Path) -> None:
    with pytest.raises(kvjax.KvjaxError, match="progress is of type int; expected what can be called"):
        kvjax.sweep(tiny, text, "dense", progress=3, **SIZES)  # type: ignore[arg-type]


def test_a_plan_of_another_model_is_refused(tiny: kvjax.Model, text: Path) -> None:
    shallow = kvjax.CachePlan.parse("dense", dataclasses.replace(ModelSizes.of(tiny.config), layers=1))
    with pytest.raises(kvjax.KvjaxError, match="dense is for"):
        kvjax.sweep(tiny, text, [shallow], **SIZES)


def test_rows_for_people(swept: tuple[Rows, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = swept[0]
    assert repr(rows) == "<Rows of dense, k4v4@token>"
    head, *lines = rows.table().splitlines()
    assert head.split()[:2] == ["cache", "bits"] and [line.split()[0] for line in lines] == ["dense", "k4v4@token"]
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda given: ("frame", given)))
    assert rows.to_pandas() == ("frame", list(rows))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(kvjax.KvjaxError, match="to_pandas needs pandas; expected: pip install pandas"):
        rows.to_pandas()


def test_score_is_the_sweeps_and_compares(tiny: kvjax.Model, text: Path, swept: tuple[Rows, Path]) -> None:
    ids = tiny.tokenizer.encode(text.read_text())
    score, dense = kvjax.score(tiny, ids, "k4v4@token", **SIZES), kvjax.score(tiny, text.read_text(), **SIZES)
    assert score.figures.items() <= swept[0][1].items() and dense.figures.items() <= swept[0][0].items()
    assert score.per_token.nll.shape == (2, 23) and len(repr(score)) < 120 and "TokenScores" not in repr(score)
    difference = score.compare(dense)
    paired = (score.per_token.nll - dense.per_token.nll).mean(1)  # of each window
    assert difference.nll == pytest.approx(score.nll - dense.nll) and difference.kld == pytest.approx(score.kld)
    assert difference.nll_interval == pytest.approx(12.7062 * np.std(paired, ddof=1) / np.sqrt(2), rel=1e-4)
    with pytest.raises(kvjax.KvjaxError, match=r"of type float; expected what kvjax\.score gives"):
        score.compare(0.5)  # type: ignore[arg-type]
    with pytest.raises(kvjax.KvjaxError, match="other tokens"):
        score.compare(kvjax.score(tiny, ids, offset=1, **SIZES))
