"""Plans in ModelOpt's metadata, and the float formats that it names."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvjax.caches import modelopt
from kvjax.caches.base import ModelSizes
from kvjax.caches.floats import GROUP, Fp8Rows, Nvfp4Rows
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError

MODEL = ModelSizes(layers=4, heads=2, kv_heads=1, head_dim=32, model_dim=64)


def parse(text):
    return CachePlan.parse(text, MODEL)


def entries(**formats: str) -> dict:
    return {f"model.layers.{layer[1:]}.self_attn": {"quant_algo": name} for layer, name in formats.items()}


MAP = entries(_0="FP8", _2="NVFP4", _3="FP8_K_NVFP4_V")
PLAN = "0:fp8;1:dense;2:nvfp4;3:kfp8vfp4"
NESTED = {module.replace("model.", "language_model.model."): entry for module, entry in MAP.items()}
FILES = {
    "schema 1": (
        {"quantization": {"quant_algo": None, "kv_cache_quantized_layers": MAP, "kv_cache_schema_version": 1}},
        PLAN,
    ),
    "older envelope": (
        {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}, "kv_cache_quantized_layers": MAP}},
        PLAN,
    ),
    "config.json": (
        {"quantization_config": {"quant_method": "modelopt", "kv_cache_quantized_layers": NESTED}, "hidden_size": 64},
        PLAN,
    ),
    "one format": ({"quantization": {"kv_cache_quant_algo": "NVFP4"}}, "nvfp4"),
    "keys and values apart": ({"quantization": {"kv_cache_quant_algo": "FP8_K_NVFP4_V"}}, "kfp8vfp4"),
    "a scheme": (
        {"quantization_config": {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}},
        "fp8",
    ),
    "a scheme's name": ({"quantization_config": {"kv_cache_scheme": "NVFP4"}}, "nvfp4"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read(tmp_path, name: str) -> None:
    data, plan = FILES[name]
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps(data))
    assert parse(str(file)) == parse(plan)


@pytest.mark.parametrize("plan", [PLAN, "fp8", "nvfp4", "0-2:dense;3:fp8"])
def test_what_is_written_is_read(tmp_path, plan: str) -> None:
    assert modelopt.says(parse(plan).specs)
    file = tmp_path / "hf_quant_config.json"
    file.write_text(parse(plan).modelopt())
    assert parse(str(file)) == parse(plan)


def test_what_is_written_is_schema_1() -> None:
    data = json.loads(parse(PLAN).modelopt())
    assert data["producer"]["name"] == "modelopt"
    assert data["quantization"] == {
        "quant_algo": None,
        "quantized_layers": {},
        "exclude_modules": [],
        "kv_cache_quant_algo": "MIXED_PRECISION",
        "kv_cache_quantized_layers": MAP,
        "kv_cache_schema_version": 1,
    }
    assert json.loads(parse("fp8").modelopt())["quantization"]["kv_cache_quant_algo"] == "FP8"


WRONG = {
    "expected ModelOpt's metadata": {"hidden_size": 64},
    "kv_cache_schema_version=2; expected 1": {
        "quantization": {"kv_cache_quantized_layers": MAP, "kv_cache_schema_version": 2}
    },
    "'model.layers.4.self_attn'; expected attention of one of the model's 4 layers": {
        "quantization": {"kv_cache_quantized_layers": entries(_4="FP8")}
    },
    "'model.layers.0.mlp'": {"quantization": {"kv_cache_quantized_layers": {"model.layers.0.mlp": {}}}},
    "format 'INT8'; expected FP8, NVFP4": {"quantization": {"kv_cache_quant_algo": "INT8"}},
    "format None": {"quantization": {"kv_cache_quantized_layers": {"model.layers.0.self_attn": {}}}},
    "kv_cache_quantized_layers is empty or no map": {
        "quantization": {"kv_cache_quant_algo": "FP8", "kv_cache_quantized_layers": []}
    },
    "format {'num_bits': 8, 'type': 'int'}": {
        "quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_other_files_are_refused(tmp_path, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(WRONG[message]))
    with pytest.raises(KvjaxError) as error:
        parse(str(file))
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("plan", ["k4v4", "dense", "fp8(sink=4)"])
def test_other_plans_are_not_written(plan: str) -> None:
    assert not modelopt.says(parse(plan).specs)
    with pytest.raises(KvjaxError, match=r"layer 0 is|no layer is quantised"):
        parse(plan).modelopt()


# ---- the formats


def rows(*shape: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_fp8_is_ml_dtypes_e4m3_and_saturates() -> None:
    x = np.append(rows(255, scale=20), [1e5, -1e5, 449, np.nan]).astype(np.float32)
    found = np.asarray(Fp8Rows().decode(Fp8Rows().encode(jnp.asarray(x)), jnp.float32))
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert found[-2] == 448 and np.isnan(found[-1])


def test_nvfp4_takes_the_nearest_of_its_levels() -> None:
    x = rows(64, 2 * GROUP)
    codes, scale = Nvfp4Rows().encode(jnp.asarray(x))
    assert codes.nbytes + scale.nbytes == x.size * Nvfp4Rows().bits_asymptotic / 8
    step = np.asarray(scale).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    largest = np.abs(x.reshape(64, -1, GROUP)).max(-1)
    np.testing.assert_allclose(step, largest / 6, rtol=2**-4)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    levels = np.concatenate([-levels, levels]) * step[..., None]
    groups = x.reshape(64, -1, GROUP, 1)
    nearest = np.abs(groups - levels[:, :, None]).min(-1).reshape(x.shape)
    found = Nvfp4Rows().decode((codes, scale), jnp.float32)
    np.testing.assert_allclose(np.abs(found - x), nearest, atol=1e-6)


def test_nvfp4_rounds_as_ml_dtypes_do() -> None:
    """Halves and all; a scale of 1."""
    x = np.arange(-6, 6.001, 0.125, np.float32)
    x = np.append(np.resize(x, (len(x) // (GROUP - 1) + 1, GROUP - 1)), np.full((7, 1), 6.0), 1).astype(np.float32)
    found = Nvfp4Rows().decode(Nvfp4Rows().encode(jnp.asarray(x)), jnp.float32)
    np.testing.assert_array_equal(found, x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_nvfp4_of_zeros_is_zeros() -> None:
    x = jnp.zeros((2, GROUP))
    assert not np.asarray(Nvfp4Rows().decode(Nvfp4Rows().encode(x), jnp.float32)).any()


def test_bits_and_widths_of_heads() -> None:
    assert [parse(name).bits_asymptotic for name in ("fp8", "nvfp4", "kfp8vfp4")] == [8, 4.5, 6.25]
    assert str(parse("nvfp4")) == "kfp4vfp4"
    with pytest.raises(KvjaxError, match="head_dim 24; expected a multiple of 16"):
        CachePlan.parse("nvfp4", ModelSizes(layers=1, heads=1, kv_heads=1, head_dim=24, model_dim=24))
