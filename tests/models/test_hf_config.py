"""config.json: every key is used as transformers uses it, harmless, or refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tests.goldens.config_cases import BASE, CASES, COLUMNS, KEPT, LONGROPE, SAME, WINDOW, config_of, tokens, weight

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.safetensors import as_decoder, names_of
from kvjax.errors import KvjaxError
from kvjax.models.config import FAMILIES
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import KEYS, from_hf
from kvjax.models.params import param_shapes

TOLERANCE = 2e-5


def logits(config):
    """Logits [KEPT, COLUMNS], op by op: the cases share most shapes."""
    params = unflatten_dict(
        {
            path: jnp.asarray(as_decoder(config, path, weight(names_of(config).of(path), shape)))
            for path, shape in param_shapes(config).items()
        }
    )
    ids = jnp.asarray(tokens())
    cache = CachePlan.parse("dense", config).init(CacheShape.of(config, 1, ids.shape[1], jnp.float32))
    decoder = Decoder(config)
    hidden, _ = decoder.apply({"params": params}, ids, cache)
    return np.asarray(decoder.apply({"params": params}, hidden, method="logits"))[0, -KEPT:, :COLUMNS]


@pytest.mark.parametrize("family", CASES)
def test_values_do_what_they_do_in_transformers(family, goldens):
    expected = np.load(goldens / "config-goldens.npz")
    base = expected[f"{family}/base"]
    for name, changes in CASES[family].items():
        golden = expected[f"{family}/{name}"]
        largest = np.abs(golden).max()
        assert name == "base" or np.abs(golden - base).max() > 1e-3 * largest, f"{name} changes nothing"
        error = np.abs(logits(from_hf(config_of(family, changes))) - golden).max()
        assert error <= TOLERANCE * largest, f"{name}: {error / largest}"


@pytest.mark.parametrize(
    ("family", "name", "other", "changes"),
    [(family, name, *case) for family in SAME for name, case in SAME[family].items()],
)
def test_values_that_are_the_same(family, name, other, changes):
    """The script of the goldens checks the same in transformers."""
    assert from_hf(config_of(family, changes)) == from_hf(config_of(family, CASES[family][other]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_is_known(family, goldens):
    keys = KEYS[family]
    written = json.loads((goldens / "config-keys.json").read_text())[family]
    assert {*written} <= {*keys.used, *keys.harmless, *keys.neutral}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_key_is_refused_or_neutral(family):
    base = from_hf(config_of(family, {}))
    for key, neutral in KEYS[family].neutral.items():
        for value in (None, *neutral, [*neutral]):
            assert from_hf(config_of(family, {key: value})) == base
        with pytest.raises(KvjaxError, match=f"^{key} of a {family} config.json is .*; expected"):
            from_hf(config_of(family, {key: {"another": 3}}))
    for key in KEYS[family].harmless:
        assert from_hf(config_of(family, {key: {"another": 3}})) == base


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_interleave", True),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0078125),
        ("logits_scaling", 8.0),
        ("query_pre_attn_scalar", 256),
        ("num_local_experts", 8),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("attention_chunk_size", 8192),
        ("use_qk_norm_of_another_kind", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("some_new_rope_trick", 3),
        ("some_new_moe_layer", [1, 0, 1]),
        ("hidden_act", "relu"),
        ("rope_scaling", {"rope_type": "proportional", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_medium": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0, "alpha": 1000.0}),
        ("rope_scaling", {"factor": 4.0}),
        ("rope_scaling", {"type": "linear", "factor": 4.0, "attention_factor": 1.5}),
        ("rope_scaling", {"type": "linear", "factor": 4.0, "beta_fast": 32}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("layer_types", ["chunked_attention"] * 3),
        ("layer_types", ["full_attention"] * 2),
        ("layer_types", ["sliding_attention", "full_attention", "full_attention"]),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(family, key, value):
    name = {"rope_scaling": "rope.scaling|rope_scaling", "rope_parameters": "rope scaling"}.get(key, key)
    with pytest.raises(KvjaxError, match=name):
        from_hf(config_of(family, {key: value}))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"sliding_window": 6}, "sliding_window is 6 and use_sliding_window None in a llama config.json"),
        ("mistral", {**WINDOW, "use_sliding_window": False}, "sliding_window is 6 and use_sliding_window False"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected a whole number from 1"),
        ("mistral", {"sliding_window": 6, "layer_types": ["full_attention"] * 3}, "layer_types has 0 sliding_att"),
        ("mistral", {"attention_bias": True}, "attention_bias of a mistral config.json is True"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias of a qwen2 config.json is True"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias of a qwen2 config.json is False"),
        ("qwen2", {"use_sliding_window": "yes", "sliding_window": 6}, "use_sliding_window is 'yes'; expected true"),
        ("llama", {"num_attention_heads": "4"}, "num_attention_heads is '4'; expected a whole number from 1"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"rope_theta": 0}, "rope_theta is 0; expected a positive number"),
        (
            "gemma3_text",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping of a gemma3_text",
        ),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported; expected one of"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta of rope_parameters is 10000.0"),
        (
            "phi3",
            {"partial_rotary_factor": 0.3},
            "rope turns 2.4 of the 8 channels of a head; expected an even number",
        ),
        (
            "gemma3_text",
            {"_sliding_window_pattern": 0},
            "_sliding_window_pattern is 0; expected a whole",
        ),
        ("granite", {"num_local_experts": 4}, "num_local_experts of a granite config.json is 4"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention'"),
        ("llama", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers of a llama config.json is"),
        (
            "smollm3",
            {"no_rope_layers": [1, 1]},
            r"no_rope_layers is \[1, 1\]; expected num_hidden_layers = 3 ",
        ),
        ("llama", {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, "short_factors has 1 numbers; expected 4"),
        (
            "llama",
            {"rope_scaling": {**LONGROPE, "long_factor": 2}},
            "long_factor of rope_scaling is 2; expected",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor of rope_scaling is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor of rope_scaling is '4'; expected"),
    ],
)
def test_messages_name_the_key(family, changes, message):
    with pytest.raises(KvjaxError, match=message):
        from_hf(config_of(family, changes))


@pytest.mark.parametrize(
    ("family", "changes", "same"),
    [
        ("llama", {key: float(value) for key, value in BASE.items() if key.startswith("num_")}, {}),
        ("llama", {"head_dim": None}, {}),
        ("llama", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ("qwen2", {"rope_theta": 10000}, {}),
        (
            "llama",
            {"eos_token_id": [1, 2], "torch_dtype": "bfloat16", "unsloth_version": "2024.9", "my_notes": 3},
            {},
        ),
        ("llama", {"sliding_window": 6, "use_sliding_window": False, "max_window_layers": 28}, {}),
        ("llama", {"num_local_experts": 0, "logits_scaling": 1.0, "no_rope_layers": [1, 1, 1]}, {}),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 4, "finetuned": True}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000}},
        ),
    ],
)
def test_values_as_people_write_them(family, changes, same):
    assert from_hf(config_of(family, changes)) == from_hf(config_of(family, same))


@pytest.mark.parametrize(
    ("family", "missing", "expected"),
    [
        ("llama", "num_key_value_heads", {"kv_heads": 16}),
        ("mistral", "num_key_value_heads", {"kv_heads": 8}),
        ("mistral", "sliding_window", {"window": 4096}),
        ("qwen3", "head_dim", {"head_dim": 128}),
        ("qwen2", "head_dim", {"head_dim": 2}),
        ("llama", "max_position_embeddings", {"max_positions": 2048}),
        ("qwen2", "max_position_embeddings", {"max_positions": 32768}),
        ("llama", "rms_norm_eps", {"norm_eps": 1e-6}),
    ],
)
def test_keys_that_are_left_out_have_transformers_values(family, missing, expected):
    hf = config_of(family, {"num_attention_heads": 16})
    hf.pop(missing)
    config = from_hf(hf)
    assert {name: getattr(config, name) for name in expected} == expected
