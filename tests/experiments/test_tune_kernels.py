"""The tuner of kernels in the interpreter: what it writes is what the kernel then uses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from kvjax.configs.tune_kernels import get_config
from kvjax.experiments import throughput, tune_kernels
from pallas_kernels import tuning
from pallas_kernels.packed_attention import triton

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_what_is_measured_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_config()
    config.update(heads="4/2x64", pairs="k4v4@token", points="1x512", dtype="float32", rounds=1, calls=1)
    config.interpret = True
    monkeypatch.setattr(throughput, "COLD", 1)
    monkeypatch.setattr(tune_kernels, "FACTORS", {"block": (0.5, 1, 3), "splits": (1, 2)})  # 3: none that serves
    tune_kernels.main(config, tmp_path)
    file = tmp_path / tuning.file_of(jax.devices()[0].device_kind).name
    [entry] = json.loads(file.read_text())
    assert entry["settings"].keys() == {"block", "splits", "num_warps", "num_stages"} and entry["us"] > 0

    args, shape = tune_kernels._arguments(config, "k4v4@token", 1, 512)
    assert entry["class"] == shape and tuning.lookup("packed_attention", shape) == {}
    entry["settings"]["splits"] = 3
    file.write_text(json.dumps([entry]))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    used = []
    plan = triton.TritonPlan
    monkeypatch.setattr(triton, "TritonPlan", lambda *args: used.append(args[5]) or plan(*args))  # the splits
    tuning._table.cache_clear()
    triton.packed_attention(*args, first=0, window=None, scale=0.1, interpret=True)
    tuning._table.cache_clear()
    assert used == [3]

    before = file.read_bytes()
    tune_kernels.main(config, tmp_path)
    assert file.read_bytes() == before  # nothing is measured twice
