"""Values of config.json that change what a decoder computes, with weights that need no file.

Shared by make_config_goldens.py, which asks transformers, and tests/models/test_hf_config.py.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int

BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"
# Where a family's own default does not suit the cases.
_OWN_HEAD = {"tie_word_embeddings": False, "pad_token_id": None}
BASES: dict[str, dict[str, Any]] = {
    "smollm3": _OWN_HEAD,
    "gemma3_text": {**_OWN_HEAD, "sliding_window": 6, "sliding_window_pattern": 2, "eos_token_id": None},
    "olmo2": {"pad_token_id": None},
    "phi3": {"pad_token_id": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmo3": {
        "pad_token_id": None,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
TOKENS, KEPT, COLUMNS = 40, 4, 32  # fed; positions from the end and columns of which the logits are kept
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    **{"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.0]},
    **{"original_max_position_embeddings": 16},
}
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "width": {"hidden_size": 64},
    "width of the MLP": {"intermediate_size": 40},
    "layers": {"num_hidden_layers": 2},
    "heads": {"num_attention_heads": 8},
    "kv heads": {"num_key_value_heads": 1},
    "head dim": {"head_dim": 12},
    "eps": {"rms_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True},
}
EVERYWHERE: dict[str, dict[str, Any]] = {
    **SHAPES,
    "theta": {"rope_theta": 500.0},
    "theta, new spelling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "theta twice": {"rope_theta": 99.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new spelling": {"rope_parameters": LINEAR},
    "linear wins over default": {
        "rope_scaling": {"rope_type": "linear", "factor": 4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    "llama3, length from the model": {"rope_scaling": LLAMA3},
    "llama3, length beside it": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 16,
    },
}
ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 50.0}},
    "yarn, old spelling": {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 30.0},
    "yarn, length from the model": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 24},
    "yarn, factor of attention": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "yarn, ramp": {"rope_scaling": {**YARN, "beta_fast": 1.5, "beta_slow": 0.1}, "rope_theta": 30.0},
    "yarn, ramp not truncated": {
        "rope_scaling": {**YARN, "beta_fast": 1.5, "beta_slow": 0.1, "truncate": False},
        "rope_theta": 30.0,
    },
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "longrope, long text": {"rope_scaling": LONGROPE},
    "longrope, text of the original length": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 40}},
    "longrope, with a factor": {"rope_scaling": {**LONGROPE, "factor": 8.0}},
    "longrope, factor of attention": {"rope_scaling": {**LONGROPE, "attention_factor": 1.5}},
}
TWO_ROPES: dict[str, dict[str, Any]] = {
    "theta of full layers": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    "theta of windows": {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    "two ropes": {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 50.0}, "sliding_attention": LINEAR}},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
CHOOSING: dict[str, dict[str, Any]] = {  # Qwen's layers have a window or not
    "windows from layer 0": {**WINDOW, "max_window_layers": 0},
    "windows from layer 2": {**WINDOW, "max_window_layers": 2},
    "windows by type": {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    "types win": {**WINDOW, "max_window_layers": 2, "layer_types": [SLIDING, FULL, FULL]},
    "narrower": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **EVERYWHERE,
        **ROPES,
        "attention bias": {"attention_bias": True},
        "mlp bias": {"mlp_bias": True},
    },
    "mistral": {**EVERYWHERE, "window": {"sliding_window": 6}},
    "qwen2": {**EVERYWHERE, **CHOOSING},
    "qwen3": {**EVERYWHERE, **CHOOSING, "attention bias": {"attention_bias": True}, "yarn": ROPES["yarn"]},
    "smollm3": {
        **EVERYWHERE,
        "yarn": ROPES["yarn"],
        "attention bias": {"attention_bias": True},
        "mlp bias": {"mlp_bias": True},
        "every second without rope": {"no_rope_layer_interval": 2},
        "some without rope": {"no_rope_layers": [0, 1, 0]},
        "windows where there is no rope": {**WINDOW, "no_rope_layers": [0, 1, 0]},
        "windows by type": {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    },
    "granite": {
        **EVERYWHERE,
        "attention bias": {"attention_bias": True},
        "mlp bias": {"mlp_bias": True},
        "embedding multiplier": {"embedding_multiplier": 12.0},
        "residual multiplier": {"residual_multiplier": 0.22},
        "attention multiplier": {"attention_multiplier": 0.1},
        "logits scaling": {"logits_scaling": 8.0},
    },
    "gemma3_text": {
        **SHAPES,
        **TWO_ROPES,
        "attention bias": {"attention_bias": True},
        "activation": {"hidden_activation": "silu"},
        "query scale": {"query_pre_attn_scalar": 8},
        "window": {"sliding_window": 12},
        "pattern": {"sliding_window_pattern": 3},
        "windows by type": {"layer_types": [FULL, SLIDING, FULL]},
        "ropes, old spelling": {"rope_theta": 500.0, "rope_local_base_freq": 20.0},
        "scaled rope, old spelling": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    "olmo2": {**EVERYWHERE, "attention bias": {"attention_bias": True}, "yarn": ROPES["yarn"]},
    "olmo3": {
        **SHAPES,
        **TWO_ROPES,
        "layers": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
        "window": {"sliding_window": 12},
        "pattern": {"num_hidden_layers": 4, "layer_types": None},
        "windows by type": {"layer_types": [FULL, SLIDING, FULL]},
        "yarn, old spelling": {"rope_scaling": {**YARN, "beta_fast": 1.5, "beta_slow": 0.1}},
    },
}
FOLDERS = (
    "phi3",
    "qwen3_moe",
    "gpt_oss",
)  # families whose files hold weights in another form: goldens in folders only
# Same logits as the base, or as the case that is named.
SAME: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    family: {
        "swish": ("base", {"hidden_act": "swish"}),
        "default": ("base", {"rope_scaling": {"rope_type": "default"}}),
        "all full": ("base", {"layer_types": [FULL] * 3}),
    }
    for family in CASES
    if family not in ("gemma3_text", "olmo3")
}
SAME["gemma3_text"] = {
    "default": ("base", {"rope_scaling": {"rope_type": "default"}}),
    "pattern by type": ("pattern", {"layer_types": [SLIDING, SLIDING, FULL]}),
}
SAME["olmo3"] = {"one rope": ("base", {"rope_parameters": {"sliding_attention": {"rope_theta": 5e5}}})}
SAME["smollm3"] |= {
    "all with rope": ("base", {"no_rope_layers": [1, 1, 1]}),
    "window off": ("base", {"use_sliding_window": False, "sliding_window": 6}),
}
for _family in ("qwen2", "qwen3"):
    SAME[_family] |= {
        "window off": ("base", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0}),
        "windows from layer 28": ("base", WINDOW),
        "all full in spite of a window": ("base", {**WINDOW, "max_window_layers": 0, "layer_types": [FULL] * 3}),
        "all sliding": ("windows from layer 0", {**WINDOW, "layer_types": [SLIDING] * 3}),
    }


def config_of(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The object of a config.json."""
    return copy.deepcopy(
        {"model_type": family, **BASE, **BASES.get(family, {}), **changes}
    )  # transformers writes into it


def tokens() -> Int[np.ndarray, "1 T"]:
    return np.random.default_rng(0).integers(0, BASE["vocab_size"], (1, TOKENS))


def weight(name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Random values of one tensor, from its HF name and shape."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 0.5 if name.endswith("bias") else 1.5 * shape[-1] ** -0.5
    return (scale * rng.standard_normal(shape)).astype(np.float32)
