"""HF folders: what is read, and what is refused with one clear line."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.checkpoints.load import load
from kvjax.checkpoints.safetensors import load_hf
from kvjax.errors import KvjaxError

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(goldens, tmp_path):
    """A copy of a golden, to be damaged."""
    return shutil.copytree(goldens / "llama-linear", tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, message):
    with pytest.raises(KvjaxError, match=message) as caught:
        load_hf(folder, jnp.float32)
    assert "\n" not in str(caught.value)


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(HEAD))
    refused(folder, r"tensor lm_head\.weight is missing; expected shape \(128, 64\)")


def test_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM][:32]}))
    refused(folder, r"tensor model\.norm\.weight has shape \(32,\); expected \(64,\)")


def test_a_tensor_that_would_be_ignored(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": tensors[NORM]}))
    refused(folder, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is not part of a llama decoder")


def configure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_rotary_tables_are_skipped(folder):
    whole = load_hf(folder, jnp.float32)[1]
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": tensors[NORM]}))
    same(load_hf(folder, jnp.float32)[1], whole)


def test_a_tied_head_as_transformers_has_it(folder):
    """A head that is the embedding is left out, another one is used, and alone it is the embedding."""
    whole = load_hf(folder, jnp.float32)[1]
    configure(folder, tie_word_embeddings=True)
    config, params = load_hf(folder, jnp.float32)
    assert not config.tied
    same(params, whole)
    rewrite(folder, lambda tensors: tensors.update({EMBED: tensors[HEAD]}))
    config, params = load_hf(folder, jnp.float32)
    assert config.tied and "head" not in params
    same(params["embed"], whole["head"])
    rewrite(folder, lambda tensors: tensors.pop(EMBED))
    same(load_hf(folder, jnp.float32)[1]["embed"], whole["head"])


@pytest.mark.parametrize("size", [5, 1000, -3])
def test_truncated(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "is not a whole safetensors file")


def test_missing_shard(goldens, tmp_path):
    folder = shutil.copytree(goldens / "qwen3", tmp_path / "model")
    (folder / "model-00002-of-00004.safetensors").unlink()
    refused(folder, "model-00002-of-00004.safetensors is missing")


def test_pickles_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, re.escape("holds pickles (pytorch_model.bin), which are never loaded; expected safetensors"))


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json cannot be read: No such file")


def test_load_keeps_the_first_layers(goldens):
    whole, first = load(str(goldens / "qwen3")), load(str(goldens / "qwen3"), "bfloat16", layers=1)
    assert set(first.params) == {"embed", "norm", "head", "layer_0"}
    assert first.config.layers == 1 and first.name.endswith("qwen3(layers=1)")
    expected = whole.params["layer_0"]["q"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(first.params["layer_0"]["q"], expected)
    assert (whole.tokenizer.bos_id, whole.tokenizer.eos_ids) == (1, (2,))
