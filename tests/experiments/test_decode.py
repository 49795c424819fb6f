"""Decode steps side by side on a tiny model, and what full blocks cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.configs import decode as decode_config
from kvjax.experiments import decode
from kvjax.records import read_rows

MODEL = Path(__file__).parents[1] / "goldens/llama-llama3"


@pytest.mark.parametrize(
    ("text", "depth", "more"),
    [
        ("k4v4@kivi(group=8)", 13, 70.0),  # steps leave 14 to 19 tokens: the third completes a block
        ("0:k4v4@kivi(group=8);1:k4v4@token", 13, 70.0),
        ("k4v4@kivi(group=8)", 16, None),  # none of 17 to 22 does
        ("k4v4@token", 13, None),  # all do
        ("dense", 13, None),
    ],
)
def test_what_a_full_block_costs(text: str, depth: int, more: float | None) -> None:
    plan = CachePlan.parse(text, read_config(str(MODEL)))
    assert decode.flush_ms(plan, depth, [10, 10, 80, 11, 9, 10]) == more


@pytest.mark.usefixtures("quick_compilation")
def test_rows_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, text = decode_config.get_config(), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    caches = "dense,k4v4@kivi(group=8)"
    config.update(model=str(MODEL), text=str(text), caches=caches, depth=20, max_len=64, steps=12)
    decode.main(config, tmp_path)
    dense, packed, half = read_rows(tmp_path / "decode.jsonl")
    assert (dense["ratio"], half["kv_dtype"]) == (1.0, "bfloat16")
    assert dense["flush_ms"] is None and packed["flush_ms"] is not None
    assert 0 < packed["cache_bytes"] < half["cache_bytes"] < dense["cache_bytes"]
    assert "flush ms" in capsys.readouterr().out
