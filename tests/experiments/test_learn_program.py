"""`kvjax learn` on a tiny model: rows, picture, scores, and a second run with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvjax
from kvjax.configs import learn as learn_config
from kvjax.configs import perplexity as perplexity_config
from kvjax.errors import KvjaxError
from kvjax.experiments import learn, program

MODEL = str(Path(__file__).parents[2] / "tests/goldens/qwen3")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_it_learns_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    (tmp_path / "other.txt").write_text("one two three four five six seven. " * 400)
    config = learn_config.get_config()
    cache = "xcl2@latent(group=8,sink=4,per=channel,fold=1,base=0,basis=learned,gain=1)"
    config.update(model=MODEL, calibration=f"{tmp_path}/own.txt", judged_on=f"{tmp_path}/other.txt", cache=cache)
    config.update(context=24, windows=2, steps=3, rate=1e-3, polish=2)
    learn.main(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "learn.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == [0, 1, "all"]
    scores = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert ["trained_sha256" in row for row in scores] == [False, True]
    said = capsys.readouterr().out
    assert "layer all:" in said and f"{scores[1]['kld']:.4f}" in said
    assert (tmp_path / "learn.png").stat().st_size > 10_000
    learn.main(config, tmp_path)  # nothing is done again
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    with pytest.raises(KvjaxError, match="calibration is empty"):
        config.calibration = ""
        learn.main(config, tmp_path)


def test_adapters_are_learned_judged_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    (tmp_path / "other.txt").write_text("one two three four five six seven. " * 400)
    config = learn_config.get_config("lora")
    config.update(model=MODEL, calibration=f"{tmp_path}/own.txt", judged_on=f"{tmp_path}/other.txt", rank=2, steps=3)
    config.update(context=24, windows=2, cache="k2v2@token(group=8)", seen_context=24, seen_windows=3)
    learn.main(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "adapters.jsonl").read_text().splitlines()]
    assert [(row["cache"], row["adapters"]) for row in rows] == [
        ("k2v2@token(group=8)", False),
        ("dense", True),
        ("k2v2@token(group=8)", True),
    ]
    assert rows[0]["kld_less_plain"] == 0 < rows[1]["kld"] and rows[2]["kld"] != rows[0]["kld"]
    assert f"{rows[2]['kld']:.4f}" in capsys.readouterr().out
    taken = perplexity_config.get_config()
    taken.update(model=MODEL, adapters=str(tmp_path / "adapters.safetensors"))
    assert program.load(taken).checksum != program.load_plain(config).checksum
    with pytest.raises(KvjaxError, match="expected one of encoders, lora, model"):
        config.what = "everything"
        learn.main(config, tmp_path)


def test_a_model_is_trained_kept_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "other.txt").write_text("one two three four five six seven. " * 40)
    config = learn_config.get_config("model")
    config.update(model=MODEL, calibration=f"{tmp_path}/own.txt", judged_on=f"{tmp_path}/other.txt", steps=3, batch=2)
    config.update(context=24, windows=2, cache="dense,x2@input(group=8)", seen_context=24)
    learn.main(config, tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "model.jsonl").read_text().splitlines()]
    assert row["curve"][0][0] == 0 and row["curve"][-1][0] == 3 and len(row["k_likeness"]) == 2
    scores = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(scores) == 4 and len({score["model_sha256"] for score in scores}) == 2
    (folder,) = tmp_path.glob("model-*")
    assert f"the trained model is {folder};" in capsys.readouterr().out
    again = kvjax.score(kvjax.load(folder), tmp_path / "other.txt", "dense", context=24, windows=2)
    assert again.nll == pytest.approx(scores[2]["nll"], rel=1e-6)
    learn.main(config, tmp_path)  # nothing is done again
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
