"""The config of a decoder: shapes and options, read from a HF `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvjax.errors import KvjaxError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SCALINGS = ("none", "linear", "llama3")


def _check_sizes(config: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not least <= value < 2**31:
            raise KvjaxError(f"{name} is {value!r}; expected a whole number from {least} to 2**31 - 1")


def _check_reals(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 < value < 1e30:  # NaN is neither
            raise KvjaxError(f"{name} is {value!r}; expected a positive number")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` and one of the scalings `none`, `linear`, `llama3`."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as the next two
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        """Raises KvjaxError for values that are not valid for RoPE."""
        if self.scaling not in SCALINGS:
            raise KvjaxError(f"rope scaling {self.scaling!r} is not supported; expected one of {', '.join(SCALINGS)}")
        _check_reals(self, "theta", "factor", "low_freq_factor", "high_freq_factor")
        _check_sizes(self, "original_max_positions")
        if self.low_freq_factor >= self.high_freq_factor:
            raise KvjaxError(f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor")


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
    first_window_layer: int = 0  # layers below this one attend to all tokens

    def __post_init__(self) -> None:
        """Raises KvjaxError for values that are not valid for a decoder."""
        _check_sizes(self, "vocab_size", "model_dim", "mlp_dim", "layers", "heads", "kv_heads", "head_dim")
        _check_sizes(self, "max_positions", *(["window"] if self.window is not None else []))
        _check_sizes(self, "first_window_layer", least=0)
        _check_reals(self, "norm_eps")
        for name in ("qkv_bias", "qk_norm", "tied"):
            if type(value := getattr(self, name)) is not bool:
                raise KvjaxError(f"{name} is {value!r}; expected true or false")
        if self.heads % self.kv_heads:
            raise KvjaxError(f"heads is {self.heads}; expected a multiple of the {self.kv_heads} kv heads")
        if self.head_dim % 2:
            raise KvjaxError(f"head_dim is {self.head_dim}; expected an even number")

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
            scaling["original_max_position_embeddings"],
        )
    raise KvjaxError(f"rope scaling {kind!r} is not supported; expected default, linear or llama3")


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the config of a HF `config.json`.

    Args:
      hf: the object in the file.

    Returns:
      The config of the decoder.

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
        heads, model_dim = hf["num_attention_heads"], hf["hidden_size"]
        use_window = family == "mistral" or (family in ("qwen2", "qwen3") and hf.get("use_sliding_window"))
        window = hf.get("sliding_window", 4096) if use_window else None  # HF's own defaults, here and below
        return ModelConfig(
            family=family,
            vocab_size=hf["vocab_size"],
            model_dim=model_dim,
            mlp_dim=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or model_dim // max(heads, 1),
            max_positions=hf.get("max_position_embeddings") or 2048,
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=_rope_from_hf(hf),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied=hf.get("tie_word_embeddings") or False,
            window=window or None,
            first_window_layer=hf.get("max_window_layers", 28) if window and family != "mistral" else 0,
        )
    except KvjaxError:
        raise
    except KeyError as error:
        raise KvjaxError(f"config.json has no field {error.args[0]!r}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise KvjaxError(f"config.json holds a value of the wrong kind: {error}") from None
