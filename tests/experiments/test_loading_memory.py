"""The program that measures loading: its checkpoint, its figures, and that a second start measures nothing."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import kvjax
from kvjax.configs.loading_memory import CHECKPOINTS, TIED, get_config, sizes
from kvjax.errors import KvjaxError
from kvjax.experiments import load_once, loading_memory
from kvjax.experiments.synthetic import make_checkpoint
from kvjax.models.params import param_shapes
from kvjax.records import read_rows


def tiny() -> config_dict.ConfigDict:
    """Large enough for its bytes to stand out: an embedding of 64 MiB, 16 MiB of layers."""
    config = get_config()
    config.checkpoint = config_dict.ConfigDict(sizes("llama", 65536, 512, 2048, 2, 8, 8, head_dim=64, **TIED))
    config.files = 3
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    loading_memory.main(tiny(), folder)
    return folder


def test_the_checkpoint_is_cut_into_files_of_like_size(workdir: Path) -> None:
    model = kvjax.load(workdir / "checkpoint-llama-3.2-1b", "bfloat16")
    assert model.config.tied and model.config.layers == 2 and "head" not in model.params
    weight = np.asarray(model.params["layer_1"]["down"], np.float32)
    assert weight.std() == pytest.approx(0.02, rel=0.01) and (model.params["norm"] == 1).all()
    files = sorted((workdir / "checkpoint-llama-3.2-1b").glob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) == pytest.approx(_bytes(model), rel=1e-3)


def test_figures_are_those_of_the_parameters(workdir: Path) -> None:
    one, mesh = read_rows(workdir / "loading_memory.jsonl")
    whole = _bytes(kvjax.load(workdir / "checkpoint-llama-3.2-1b", "bfloat16"))
    assert one["parameter_bytes"] == mesh["parameter_bytes"] == one["held_bytes"] == whole
    assert mesh["held_bytes"] == pytest.approx(2 * whole, rel=1e-3)  # by data twice
    for row in (one, mesh):
        assert row["anonymous_peak"] >= row["anonymous_after"] >= row["anonymous_before"] + 0.95 * whole


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_familys_checkpoint_is_loaded(name: str, tmp_path: Path) -> None:
    small = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    small |= {"head_dim": 16, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}
    own = CHECKPOINTS[name]
    files = make_checkpoint(tmp_path, own | {key: value for key, value in small.items() if key in own}, 2)
    model = kvjax.load(tmp_path, "bfloat16")
    assert model.config.family == own["model_type"] and len(files) == 2
    assert kvjax.score(model, [1, 2, 3, 4] * 3, "k4v4@token", context=12, windows=1).nll > 0


def test_what_is_there_is_not_measured_again(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_memory, "watch", lambda *_: pytest.fail("measured again"))
    loading_memory.main(tiny(), workdir)


def test_anonymous_memory_is_seen() -> None:
    before = load_once.anonymous_bytes()
    held = np.ones(2**25)
    assert load_once.anonymous_bytes() - before == pytest.approx(held.nbytes, rel=0.02)


def test_a_failed_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(KvjaxError, match=r"loading failed: .* has no model.safetensors"):
        loading_memory.watch(tmp_path, "bfloat16", "", 1)


def _bytes(model: kvjax.Model) -> int:
    return sum(int(np.prod(shape)) * jnp.bfloat16.dtype.itemsize for shape in param_shapes(model.config).values())
