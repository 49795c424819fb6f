"""What a decoder is: shapes and options, read from a HF `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvjax.errors import KvjaxError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` and one of the scalings `none`, `linear`, `llama3`."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as the next two
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and options of one decoder; hashable, static under jit."""

    family: str
    vocab_size: int
    model_dim: int
    mlp_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    window: int | None = None  # sliding window, in tokens
    first_window_layer: int = 0  # layers below it attend to everything

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees every token."""
        return self.window if layer >= self.first_window_layer else None


def _rope_from_hf(hf: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; earlier files have `rope_theta` and `rope_scaling`.
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", float(scaling["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise KvjaxError(f"rope scaling {kind!r} is not supported; expected default, linear or llama3")


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The config of a HF `config.json`.

    Raises:
      KvjaxError: an unknown model family, a missing field, or an option that `Decoder` does not have.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise KvjaxError(f"model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
    if hf.get("hidden_act", "silu") != "silu":
        raise KvjaxError(f"hidden_act {hf['hidden_act']!r} is not supported; expected silu")
    if hf.get("mlp_bias") or (family in ("llama", "qwen3") and hf.get("attention_bias")):
        raise KvjaxError(f"{family} with attention_bias or mlp_bias is not supported")
    try:
        heads, model_dim = int(hf["num_attention_heads"]), int(hf["hidden_size"])
        use_window = family == "mistral" or (family in ("qwen2", "qwen3") and hf.get("use_sliding_window"))
        window = hf.get("sliding_window", 4096) if use_window else None  # HF's own defaults, here and below
        return ModelConfig(
            family=family,
            vocab_size=int(hf["vocab_size"]),
            model_dim=model_dim,
            mlp_dim=int(hf["intermediate_size"]),
            layers=int(hf["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or model_dim // heads),
            max_positions=int(hf.get("max_position_embeddings") or 2048),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=_rope_from_hf(hf),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied=bool(hf.get("tie_word_embeddings", False)),
            window=int(window) if window else None,
            first_window_layer=int(hf.get("max_window_layers", 28)) if window and family != "mistral" else 0,
        )
    except KvjaxError:
        raise
    except KeyError as error:
        raise KvjaxError(f"config.json has no field {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise KvjaxError(f"config.json holds a value of the wrong kind: {error}") from None
