"""A model saved with Orbax comes back bit by bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoints import orbax
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.models.tokenizer import ByteTokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, goldens, tmp_path):
    model = load(str(goldens / "llama-llama3"), dtype)
    orbax.save(tmp_path / "saved", model)
    again = load(str(tmp_path / "saved"), dtype)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config == model.config and again.dtype == model.dtype
    assert dataclasses.replace(again.tokenizer, backend=None) == dataclasses.replace(model.tokenizer, backend=None)
    assert again.tokenizer.encode("a b1").tolist() == model.tokenizer.encode("a b1").tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_first_layers_in_another_dtype_and_bytes(goldens, tmp_path):
    model = load(str(goldens / "qwen3"), "float32")
    orbax.save(tmp_path / "saved", dataclasses.replace(model, tokenizer=ByteTokenizer()))
    first = load(str(tmp_path / "saved"), "bfloat16", layers=1)
    assert set(first.params) == {"embed", "norm", "head", "layer_0"}
    np.testing.assert_array_equal(
        first.params["layer_0"]["k_norm"], model.params["layer_0"]["k_norm"].astype(jnp.bfloat16)
    )
    assert first.tokenizer == ByteTokenizer()


def test_layers_without_a_window(goldens, tmp_path):
    model = load(str(goldens / "qwen2-tied"), "float32")
    assert model.config.full_layers == (0,) and model.config.window == 12
    orbax.save(tmp_path / "saved", model)
    assert load(str(tmp_path / "saved"), "float32").config == model.config
    file = tmp_path / "saved" / orbax.METADATA
    metadata = json.loads(file.read_text())
    del metadata["config"]["full_layers"]  # as earlier versions wrote it
    metadata["config"]["first_window_layer"] = 1
    file.write_text(json.dumps(metadata))
    assert load(str(tmp_path / "saved"), "float32").config == model.config


def test_refused(goldens, tmp_path):
    folder = tmp_path / "saved"
    model = load(str(goldens / "qwen3"), "float32")
    orbax.save(folder, model)
    with pytest.raises(KvjaxError, match="saved exists already; expected a new folder"):
        orbax.save(folder, model)
    metadata = json.loads((folder / orbax.METADATA).read_text())

    def refused(change, message):
        (folder / orbax.METADATA).write_text(json.dumps(metadata | {"config": metadata["config"] | change}))
        with pytest.raises(KvjaxError, match=message):
            load(str(folder))

    refused({"layers": 3}, "tensor layer_2/attention_norm is missing")
    refused({"mlp_dim": 65}, r"tensor layer_0/gate has shape \(64, 64\); expected \(65, 64\)")
    refused({"colour": 1}, "is not one that kvjax wrote")
