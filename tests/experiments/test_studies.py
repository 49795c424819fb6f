"""One layer at a time and figures by position on tiny models; tasks from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax.configs import evaluate as evaluate_config
from kvjax.configs import layers as layers_config
from kvjax.configs import positions as positions_config
from kvjax.evaluate.vocabulary import TokenScores
from kvjax.experiments import evaluate, layers, positions

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests/goldens/qwen3")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return str(file)


def test_plans_of_one_layer() -> None:
    assert layers.alone("k2v2@kivi(group=8)", 3) == [
        "0:k2v2@kivi(group=8);1-2:dense",
        "1:k2v2@kivi(group=8);0+2:dense",
        "2:k2v2@kivi(group=8);0-1:dense",
    ]
    assert layers.alone("k2v2", 1) == ["k2v2"]


def test_one_layer_at_a_time(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = layers_config.get_config()
    config.update(model=MODEL, text=text, caches="k2v2@token", context=40, windows=2)
    layers.main(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["cache"] for row in rows] == ["k2v2@token", "0:k2v2@token;1:dense", "0:dense;1:k2v2@token"]
    assert all(row["kld"] > 0 and row["protocol"] == "streaming" for row in rows)
    said = capsys.readouterr().out
    lines = {line[:12].strip(): line.split() for line in said.splitlines()}
    assert float(lines["1"][1]) == pytest.approx(rows[2]["kld"], abs=1e-5)
    assert float(lines["their sum"][2]) == pytest.approx(rows[1]["kld"] + rows[2]["kld"], abs=2e-5)
    assert float(lines["all at once"][3]) == pytest.approx(rows[0]["kld"], abs=1e-5)
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_figures_of_parts_are_means_of_their_positions() -> None:
    draw = np.random.default_rng(0)
    dense, own = (TokenScores(*draw.random((3, 4, 11))) for _ in range(2))
    parts = positions.by_part(dense, own, 3)
    assert [(part["first"], part["last"]) for part in parts] == [(1, 3), (4, 7), (8, 11)]
    assert parts[1]["kld"] == pytest.approx(own.kld[:, 3:7].mean())
    assert parts[2]["nll_increase"] == pytest.approx((own.nll - dense.nll)[:, 7:].mean())
    means = own.kld[:, :3].mean(1)
    assert parts[0]["kld_se"] == pytest.approx(means.std(ddof=1) / 2)


def test_perplexity_by_position(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = positions_config.get_config()
    config.update(model=MODEL, text=text, caches="k2v2@token", context=41, windows=2, parts=4)
    positions.main(config, tmp_path)
    file = tmp_path / "positions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["first"], row["last"]) for row in rows] == [(1, 10), (11, 20), (21, 30), (31, 40)]
    model, sizes = kvjax.load(MODEL, "float32"), {"context": 41, "windows": 2}
    (whole,) = kvjax.sweep(model, text, "k2v2@token", **sizes, folder=tmp_path)  # of the same windows, on disk
    assert np.mean([row["kld"] for row in rows]) == pytest.approx(whole["kld"])
    assert np.mean([row["nll_dense"] + row["nll_increase"] for row in rows]) == pytest.approx(whole["nll"])
    assert "21-30" in capsys.readouterr().out and (tmp_path / "positions.png").stat().st_size > 10_000
    kept = file.read_bytes()
    positions.main(config, tmp_path)
    assert file.read_bytes() == kept
    config.parts = 0
    with pytest.raises(kvjax.KvjaxError, match="parts=0; expected 1 to 40"):
        positions.main(config, tmp_path)


def test_tasks_from_the_command_line(tmp_path: Path) -> None:
    """A figure a row, a column a cache, and no path of this machine in what is kept."""
    data = tmp_path / "problems"
    data.mkdir()
    for name in ("train", "test"):
        rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(2)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable,
        "-m",
        "kvjax.experiments.evaluate",
        "--config=configs/evaluate.py",
        f"--workdir={tmp_path}",
    ]
    fields = (f"model={MODEL}", f"tasks=gsm8k(data={data},shots=1,tokens=4)", "caches=dense,k2v2@token", "batch=2")
    command += [f"--config.{field}" for field in fields]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "evaluate.jsonl").read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    assert [row["metric"] for row in rows[:4]] == ["strict", "invalid, strict", "flexible", "invalid, flexible"]
    assert [row["cache"] for row in rows] == ["dense"] * 4 + ["k2v2@token"] * 4
    assert "gsm8k(data=problems" in done.stdout and "invalid" in done.stdout and str(data) not in kept


def test_a_task_that_does_not_fit_is_said(tmp_path: Path) -> None:
    config = evaluate_config.get_config()
    config.update(model=MODEL, tasks="needle(context=9999)")
    with pytest.raises(kvjax.KvjaxError, match="context=9999; expected at most the model's 256"):
        evaluate.main(config, tmp_path)
