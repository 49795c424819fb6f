"""Memory and disk reads of loading checkpoints of the families' 8B-like shapes, a few layers each.

    kvjax loading_memory --workdir=runs/loading_memory
    kvjax loading_memory --config=loading_memory:gpt-oss-20b --workdir=runs/loading_memory

The first loads Llama-3.2-1B's shapes on one device and on eight of CPU; the others are given by name and load on one.
Each writes a checkpoint of random weights there (2 to 4 GB) and needs up to 7 GB of memory; a minute or two on two
CPU cores.
"""

from typing import Any

from ml_collections import config_dict


def sizes(kind: str, vocab: int, dim: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict:
    """A config.json."""
    return {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **more,
    }


TIED: dict[str, Any] = {"tie_word_embeddings": True}
WINDOW: dict[str, Any] = {"sliding_window": 4096}
CHECKPOINTS = {
    "llama-3.2-1b": sizes("llama", 128256, 2048, 8192, 16, 32, 8, **TIED),
    "llama-3.1-8b": sizes("llama", 128256, 4096, 14336, 3, 32, 8),
    "mistral-7b": sizes("mistral", 32768, 4096, 14336, 5, 32, 8, **WINDOW),
    "qwen2-7b": sizes("qwen2", 152064, 3584, 18944, 2, 28, 4),
    "qwen3-8b": sizes("qwen3", 151936, 4096, 12288, 2, 32, 8, head_dim=128),
    "smollm3-3b": sizes("smollm3", 128256, 2048, 11008, 12, 16, 4, **TIED),
    "granite-3.3-8b": sizes("granite", 49159, 4096, 12800, 5, 32, 8, **TIED),
    "gemma3-4b": sizes("gemma3_text", 262208, 2560, 10240, 6, 8, 4, head_dim=256, **TIED, **WINDOW),
    "olmo2-7b": sizes("olmo2", 100352, 4096, 11008, 4, 32, 32),
    "olmo3-7b": sizes("olmo3", 100278, 4096, 11008, 4, 32, 32, **WINDOW),
    "phi-4": sizes("phi3", 100352, 5120, 17920, 2, 40, 10),
    "qwen3-30b-a3b": sizes("qwen3_moe", 151936, 2048, 6144, 2, 32, 4, head_dim=128)
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "gpt-oss-20b": sizes("gpt_oss", 201088, 2880, 2880, 1, 64, 8, head_dim=64, attention_bias=True, **WINDOW)
    | {"num_local_experts": 32, "num_experts_per_tok": 4},
}


def get_config(model: str = "llama-3.2-1b") -> config_dict.ConfigDict:
    return config_dict.create(
        model=model,  # whose shapes the checkpoint has
        checkpoint=CHECKPOINTS[model],  # its config.json
        files=4,  # safetensors files of the checkpoint
        dtype="bfloat16",  # of the loaded parameters; the files hold bfloat16 or MXFP4
        mesh="data=2,tensor=4" if model == "llama-3.2-1b" else "",  # of a second measurement, none where empty
        devices=8,  # of CPU, for it
    )
