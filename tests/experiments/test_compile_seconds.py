"""The programs that measure compiling: how long it takes by layers, and what kept programs save."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from ml_collections import config_dict

from kvjax.configs import compile_seconds as compile_config
from kvjax.configs import prefill_memory as prefill_config
from kvjax.configs import starts as starts_config
from kvjax.errors import KvjaxError
from kvjax.experiments import compile_seconds, prefill_memory, starts
from kvjax.models import zoo
from kvjax.records import read_rows


@pytest.fixture(autouse=True)
def setting_comes_back() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def narrow(layers: str = "1,3") -> config_dict.ConfigDict:
    config = compile_config.get_config()
    config.update({"layers": layers, "model_dim": 32, "mlp_dim": 32, "heads": 2, "kv_heads": 1, "max_len": 64})
    config.caches = "dense,k4v4@token"
    return config


def test_more_layers_are_more_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_seconds.main(narrow(), tmp_path)
    rows = read_rows(tmp_path / "compile_seconds.jsonl")
    assert [(row["cache"], row["layers"]) for row in rows] == [
        (cache, layers) for cache in ("dense", "k4v4@token") for layers in (1, 3)
    ]
    for one, three in (rows[:2], rows[2:]):
        assert one["lines"] < three["lines"] and all(row["compile_cpu_seconds"] > 0 for row in (one, three))
    monkeypatch.setattr(compile_seconds, "compile_loop", lambda *_: pytest.fail("compiled again"))
    compile_seconds.main(narrow(), tmp_path)


@pytest.mark.parametrize("layers", ["two", "-1", "0"])
def test_what_is_no_number_of_layers(layers: str, tmp_path: Path) -> None:
    with pytest.raises(KvjaxError, match=r"layers.*expected"):
        compile_seconds.main(narrow(layers), tmp_path)


def test_a_prefill_step_holds_more_for_more_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        zoo.RANDOM["random:llama-3.1-8b"], vocab_size=64, model_dim=32, mlp_dim=64, heads=2, kv_heads=1, head_dim=16
    )
    monkeypatch.setitem(zoo.RANDOM, "random:llama-3.1-8b", small)
    config = prefill_config.get_config()
    config.update({"caches": "k4v4@token", "tokens": "64,256", "layers": 1})
    prefill_memory.main(config, tmp_path)
    few, many = read_rows(tmp_path / "prefill_memory.jsonl")
    assert many["cache_bytes"] == 4 * few["cache_bytes"] and many["temp_bytes"] > few["temp_bytes"]


def test_starts_that_fail_say_why(tmp_path: Path) -> None:
    config = starts_config.get_config()
    config.update({"caches": "dense", "max_new_tokens": -1})
    with pytest.raises(KvjaxError, match=r"the start failed: error: max_new_tokens=-1"):
        starts.main(config, tmp_path)
    assert not (tmp_path / "starts.jsonl").exists()


@pytest.mark.weekly
def test_a_warm_start_takes_less(tmp_path: Path) -> None:
    config = starts_config.get_config()
    config.update({"caches": "k4v4", "max_new_tokens": 2})
    starts.main(config, tmp_path)
    (row,) = read_rows(tmp_path / "starts.jsonl")
    assert row["warm_cpu_seconds"] < row["cold_cpu_seconds"]
