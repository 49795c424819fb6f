"""Makes the goldens of families: tiny random models, one folder each, and what HF transformers computes for them.

Needs torch and transformers (not installed with kvjax). From the root of the repository:

    python -m tests.goldens.make_family_goldens [NAME ...]

A folder has config.json, model.safetensors in bfloat16 and logits.npz: tokens [1, T] and the float32 eager logits
[1, T, V]. Windows and the lengths that ropes are stretched from are shorter than the text.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.goldens.make_goldens import COMMON as USUAL
from tests.goldens.make_goldens import HERE, TOKENS, load_hf, tiny_model
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

COMMON = USUAL | {"max_position_embeddings": 64, "pad_token_id": None}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75},  # 12 of 16 channels
    **{"short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0], "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 9.0]},
}
GPT_OSS = {
    **{"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    **{"intermediate_size": 24, "rope_parameters": YARN | {"truncate": False}},
}
MODELS = {
    "smollm3": (
        transformers.SmolLM3Config,
        {
            **{"num_hidden_layers": 4, "no_rope_layer_interval": 2, "rope_parameters": YARN},
            **{"use_sliding_window": True, "sliding_window": 12},
        },
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.125},
            **{"logits_scaling": 4.0, "tie_word_embeddings": True},
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **{"num_hidden_layers": 3, "head_dim": 24, "sliding_window": 12, "sliding_window_pattern": 2},
            **{"query_pre_attn_scalar": 32, "num_key_value_heads": 1, "num_attention_heads": 2},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 4}),
    "olmo3": (
        transformers.Olmo3Config,
        {
            **{"num_hidden_layers": 4, "sliding_window": 12},
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}},
        },
    ),
    "phi3-long": (
        transformers.Phi3Config,
        {
            **{"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
            **{"tie_word_embeddings": True},
        },
    ),
    "phi3-short": (
        transformers.Phi3Config,
        {
            **{"rope_parameters": LONGROPE, "original_max_position_embeddings": 48, "max_position_embeddings": 96},
            **{"sliding_window": 12},
        },
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {
            **{"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
            **{"norm_topk_prob": True, "tie_word_embeddings": True},
        },
    ),
    "qwen3-moe-window": (
        transformers.Qwen3MoeConfig,
        {
            **{"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"use_sliding_window": True, "sliding_window": 12, "num_attention_heads": 2},
        },
    ),
    "gpt-oss": (transformers.GptOssConfig, GPT_OSS),
    "gpt-oss-mxfp4": (transformers.GptOssConfig, GPT_OSS | {"intermediate_size": 32, "num_local_experts": 3}),
}


def tie_experts(model: transformers.PreTrainedModel) -> None:
    """Makes experts 0 and 1 the same, and their scores: one, both or neither is chosen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name and parameter.shape[0] == getattr(model.config, "num_local_experts", None):
                parameter[1] = parameter[0]


def pack_experts(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gives a gpt-oss model experts that MXFP4 holds exactly, and returns them in that form, by name."""
    packed = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = parameter.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 126, blocks.shape[:3], dtype=torch.uint8)
            with torch.no_grad():
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return packed


def save_packed(folder: Path, packed: dict[str, torch.Tensor]) -> None:
    """Replaces experts in a saved folder by MXFP4, as gpt-oss is published."""
    file = folder / "model.safetensors"
    names = {name.removesuffix("_blocks").removesuffix("_scales") for name in packed}
    rest = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    save_file(rest | packed, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(name: str) -> None:
    config_class, options = MODELS[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    model = tiny_model(config_class(**COMMON | options))
    tie_experts(model)
    packed = pack_experts(model) if name.endswith("mxfp4") else {}
    model.to(torch.bfloat16).save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(3, COMMON["vocab_size"], (1, TOKENS))
    with torch.no_grad():
        logits = load_hf(HERE / name)(tokens).logits  # from what was stored
    if packed:
        save_packed(HERE / name, packed)
    np.savez_compressed(HERE / name / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    for each in sys.argv[1:] or MODELS:
        make(each)
