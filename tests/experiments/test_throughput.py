"""The throughput program on a tiny model: its rows, that it goes on where it was, and what does not fit memory."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from ml_collections import config_dict

from kvjax.caches.plan import CachePlan
from kvjax.configs.throughput import KVTUNER_325, KVTUNER_491, get_config
from kvjax.errors import KvjaxError
from kvjax.experiments import throughput
from kvjax.models import zoo
from kvjax.models.config import ModelConfig
from kvjax.records import read_rows

TINY = {
    "heads": "4/2x64",
    "pairs": "k4v4@token,k4v2@kivi",
    "ops": "1x64,2x96",
    "models": "random:tiny",
    "caches": "dense,k4v4@token,x4@latent,0-7:k4v4;8-31:k2v2",
    "points": "2x40",
    "rounds": 1,
    "calls": 1,
}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> config_dict.ConfigDict:
    monkeypatch.setitem(zoo.RANDOM, "random:tiny", ModelConfig("llama", 64, 128, 64, 2, 4, 2, 32, 512))
    monkeypatch.setattr(throughput, "COLD", 1)
    config = get_config("cpu")
    config.update(TINY)
    return config


def test_rows_and_going_on(config: config_dict.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "throughput.jsonl"
    throughput.main(_with(config, minutes=1e-9), tmp_path)
    assert read_rows(file) == []  # no time, nothing begun

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    throughput.main(_with(config, models=""), tmp_path)
    rows = read_rows(file)
    for batch, tokens in ((1, 64), (2, 96)):
        names = [row["name"] for row in rows if (row["batch"], row["tokens"]) == (batch, tokens)]
        assert {"bf16 einsum", "k4v4@token kernel", "k4v4@token xla", "k4v2@kivi xla"} <= set(names)
    packed = next(row for row in rows if row["name"] == "k4v4@token kernel")
    assert packed["bytes"] == 2 * 2 * 64 * (64 // 2 + 4)  # K and V, heads, tokens: codes, a scale and a zero point
    assert max(row["times_bf16"] for row in rows if row["name"].startswith("bf16")) == 1.0
    with monkeypatch.context() as patch:
        patch.setattr(throughput, "_decode", full)
        throughput.main(_with(config, caches="dense"), tmp_path)
    throughput.main(config, tmp_path)
    rows = [row for row in read_rows(file) if row["part"] == "step"]
    assert [row["cache"] for row in rows] == ["dense", "k4v4@token", "x4@latent", "0-7:k4v4;8-31:k2v2"]
    assert rows[0]["out_of_memory"] and "step_ms" not in rows[0]
    assert "layers" in rows[3]["skipped"]
    for row in rows[1:3]:
        assert row["step_ms"] > 0 and row["tokens_per_second"] == pytest.approx(2000 / row["step_ms"])
    before = file.read_bytes()
    throughput.main(config, tmp_path)
    assert file.read_bytes() == before


def _with(config: config_dict.ConfigDict, **changes) -> config_dict.ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    return changed


@pytest.mark.parametrize("changes", [{"heads": "32x8x128"}, {"ops": "8"}, {"points": "0x128"}, {"ops": "2x-4"}])
def test_bad_points(config: config_dict.ConfigDict, changes: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KvjaxError, match="expected"):
        throughput.main(_with(config, **changes), tmp_path)


@pytest.mark.parametrize(("plan", "bits"), [(KVTUNER_325, 3.25), (KVTUNER_491, 4.90625)])
def test_published_plans(plan: str, bits: float) -> None:
    assert CachePlan.parse(plan, zoo.RANDOM["random:llama-3.1-8b"]).bits_nominal == bits
