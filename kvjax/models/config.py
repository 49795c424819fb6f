"""The config of a decoder: shapes and options."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.errors import KvjaxError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SCALINGS = ("none", "linear", "llama3")
MOST = 2**31 - 1  # of any size
MOST_LAYERS = 2**16 - 1


def _check_sizes(config: Any, *names: str, most: int = MOST) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= most:
            raise KvjaxError(f"{name} is {value!r}; expected a whole number from 1 to {most}")


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
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    window: int | None = None  # sliding window, in tokens
    full_layers: tuple[int, ...] = ()  # layers that attend to all tokens in spite of the window

    def __post_init__(self) -> None:
        """Raises KvjaxError for values that are not valid for a decoder."""
        _check_sizes(self, "vocab_size", "model_dim", "mlp_dim", "heads", "kv_heads", "head_dim")
        _check_sizes(self, "layers", most=MOST_LAYERS)
        _check_sizes(self, "max_positions", *(["window"] if self.window is not None else []))
        if type(self.full_layers) is not tuple or not all(type(i) is int and i >= 0 for i in self.full_layers):
            raise KvjaxError(f"full_layers is {self.full_layers!r}; expected a tuple of layers, counted from 0")
        _check_reals(self, "norm_eps")
        for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied"):
            if type(value := getattr(self, name)) is not bool:
                raise KvjaxError(f"{name} is {value!r}; expected true or false")
        if self.heads % self.kv_heads:
            raise KvjaxError(f"heads is {self.heads}; expected a multiple of the {self.kv_heads} kv heads")
        if self.head_dim % 2:
            raise KvjaxError(f"head_dim is {self.head_dim}; expected an even number")

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees every token."""
        return None if layer in self.full_layers else self.window
