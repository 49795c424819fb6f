"""A model's config alone is the config of the loaded model, and needs no weights."""

import dataclasses
import json

import pytest
from ml_collections import config_dict
from tests.goldens.config_cases import config_of
from tests.robustness.fuzz import write_gguf

from kvjax.checkpoints import orbax
from kvjax.checkpoints.load import load, read_config
from kvjax.errors import KvjaxError
from kvjax.experiments import generate, perplexity
from kvjax.models import zoo
from kvjax.models.config import ModelConfig


def test_every_kind_of_file(goldens, tmp_path):
    name = str(goldens / "llama-llama3")
    model = load(name, "float32")
    assert read_config(name) == model.config
    assert read_config(f"{name}(layers=1)") == dataclasses.replace(model.config, layers=1)
    orbax.save(tmp_path / "saved", model)
    write_gguf(tmp_path / "model.gguf", model)
    for file in ("saved", "model.gguf"):
        assert read_config(str(tmp_path / file)) == load(str(tmp_path / file), "float32").config


def test_named_models(monkeypatch):
    monkeypatch.setitem(zoo.RANDOM, "random:tiny", ModelConfig("llama", 512, 64, 96, 3, 4, 2, 16, 256))
    assert read_config("random:tiny(layers=2)") == load("random:tiny(layers=2)", "float32").config
    assert read_config("smollm2-135m-mha").kv_heads == read_config("smollm2-135m").heads == 9


@pytest.mark.parametrize(
    ("program", "plans"),
    [(generate, {"cache": "k4v4@kivi", "compare": "", "resume": ""}), (perplexity, {"caches": "dense,k4v4@kivi"})],
)
def test_a_plan_that_does_not_fit_is_refused_before_weights_are_read(program, plans, tmp_path):
    """There are no weights here."""
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", {"head_dim": 100})))
    config = config_dict.create(model=str(tmp_path), dtype="float32", save="", **plans)
    with pytest.raises(KvjaxError, match="k4v4@kivi: head_dim 100; expected a multiple of 8"):
        program.main(config, tmp_path)
