"""Tensors under the names that tools give them load the same; parts of adapters and of quantised weights do not."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.checkpoints.names import FORMS, canonical
from kvjax.checkpoints.safetensors import load_hf
from kvjax.errors import KvjaxError

NAME = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, NAME),
        ("layers.3.mlp.up_proj.weight", NAME),
        ("_orig_mod.model.layers.3.mlp.up_proj.weight", NAME),
        ("model._orig_mod.layers.3._orig_mod.mlp.up_proj.weight", NAME),
        ("module.model.layers.3.mlp.up_proj.weight", NAME),
        ("base_model.model.model.layers.3.mlp.up_proj.weight", NAME),
        ("language_model.model.layers.3.mlp.up_proj.weight", NAME),
        ("model.language_model.layers.3.mlp.up_proj.weight", NAME),
        ("_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.mlp.up_proj.weight", NAME),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("vision_tower.layers.3.mlp.up_proj.weight", "vision_tower.layers.3.mlp.up_proj.weight"),
        ("score.weight", "score.weight"),
        ("", ""),
    ],
)
def test_canonical(name, expected):
    assert canonical(name) == expected
    assert canonical(expected) == expected


@pytest.fixture
def folder(goldens, tmp_path):
    return shutil.copytree(goldens / "qwen2-tied", tmp_path / "model")


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file)


def fuse(tensors, layer, whole, parts):
    """Replaces the projections `parts` of a layer by one of all their rows."""
    for kind in ("weight", "bias"):
        names = [f"model.layers.{layer}.{part}.{kind}" for part in parts]
        if names[0] in tensors:
            tensors[f"model.layers.{layer}.{whole}.{kind}"] = np.concatenate([tensors.pop(name) for name in names])
    return tensors


QKV = [f"self_attn.{x}_proj" for x in "qkv"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()},
        lambda tensors: {f"base_model.model.{name}": value for name, value in tensors.items()},
        lambda tensors: fuse(tensors, 0, "self_attn.qkv_proj", QKV),
        lambda tensors: fuse(tensors, 1, "mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
    ],
    ids=["no prefix", "prefix", "fused qkv", "fused gate and up"],
)
def test_same_parameters(folder, change):
    _, expected = load_hf(folder, jnp.float32)
    rewrite(folder, change)
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder, jnp.float32)[1], expected)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layers.0.mlp.up_proj.weight": (64, 64)}, rf"tensors .* are both {UP}\.weight; expected one"),
        ({"model.layers.0.mlp.gate_up_proj.weight": (128, 64)}, "is there twice: on its own and in a fused tensor"),
        ({"model.layers.0.self_attn.qkv_proj.weight": (9, 64)}, r"has shape \(9, 64\); expected 64 \+ 32 \+ 32 rows"),
        ({"model.layers.0.self_attn.qkv_proj.weight": ()}, r"has shape \(\); expected 64 \+ 32 \+ 32 rows"),
        ({"lm_head.weight": ()}, r"tensor lm_head\.weight has shape \(\); expected"),
        ({"model.layers.0.self_attn.query_key_value.weight": (128, 64)}, "query_key_value.* is not part of a qwen2"),
        ({"vision_tower.layers.0.mlp.up_proj.weight": (64, 64)}, "vision_tower.* is not part of a qwen2 decoder"),
        ({f"{UP}.lora_A.weight": (4, 64)}, r"lora_A.* is part of a LoRA adapter; expected an adapter merged into"),
        ({f"{UP}.qweight": (8, 64)}, "qweight is part of a GPTQ or AWQ weight; expected float weights"),
        ({f"{UP}.weight.absmax": (8,)}, "absmax is part of a bitsandbytes weight; expected float weights"),
        ({f"{UP}.weight_scale": (1,)}, "weight_scale is part of a quantised weight; expected float weights"),
    ],
)
def test_refused(folder, more, message):
    rewrite(folder, lambda tensors: tensors | {name: np.zeros(shape, np.float32) for name, shape in more.items()})
    with pytest.raises(KvjaxError, match=message):
        load_hf(folder, jnp.float32)


def test_an_adapter_alone(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(KvjaxError, match=r"holds an adapter .*; expected the whole model, with the adapter merged"):
        load_hf(folder, jnp.float32)


def test_no_plain_weight_looks_like_another_form(goldens):
    for file in goldens.glob("*/*.safetensors"):
        assert not any(part in FORMS for name in load_file(file) for part in name.split("."))
