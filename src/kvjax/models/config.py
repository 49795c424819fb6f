"""The config of a decoder: shapes and options."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.errors import KvjaxError

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma3_text", "olmo2", "olmo3", "phi3"),
    *("qwen3_moe", "gpt_oss"),
)
SCALINGS = ("none", "linear", "llama3", "yarn", "longrope", "dynamic")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu")  # models/decoder.py has the formulas
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


def _check_layers(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not tuple or not all(type(i) is int and i >= 0 for i in value):
            raise KvjaxError(f"{name} is {value!r}; expected a tuple of layers, counted from 0")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` and a scaling. `models/rope.py` has the formulas."""

    theta: float = 10000.0
    scaling: str = "none"  # one of SCALINGS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as the next one
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0  # yarn only, as the next two
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # of cosines and sines
    short_factors: tuple[
        float, ...
    ] = ()  # longrope only: a divisor of each frequency, in texts of the original length
    long_factors: tuple[float, ...] = ()  # in longer ones
    channels: int | None = None  # of a head, that are rotated; all where None

    def __post_init__(self) -> None:
        """Raises KvjaxError for values that are not valid for RoPE."""
        if self.scaling not in SCALINGS:
            raise KvjaxError(f"rope scaling {self.scaling!r} is not supported; expected one of {', '.join(SCALINGS)}")
        _check_reals(self, "theta", "factor", "low_freq_factor", "high_freq_factor")
        _check_reals(self, "beta_fast", "beta_slow", "attention_factor")
        _check_sizes(self, "original_max_positions")
        if self.low_freq_factor >= self.high_freq_factor:
            raise KvjaxError(f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor")
        for name in ("short_factors", "long_factors"):
            values = getattr(self, name)
            if type(values) is not tuple or not all(type(x) in (int, float) and 0 < x < 1e30 for x in values):
                raise KvjaxError(f"{name} is {values!r}; expected a tuple of positive numbers")
        if self.channels is not None and (type(self.channels) is not int or self.channels < 0 or self.channels % 2):
            raise KvjaxError(f"channels is {self.channels!r}; expected an even number")
        if type(self.truncate) is not bool:
            raise KvjaxError(f"truncate is {self.truncate!r}; expected true or false")

    def check(self, head_dim: int) -> None:
        """Raises KvjaxError where it does not fit heads of `head_dim` channels."""
        channels = head_dim if self.channels is None else self.channels
        if channels > head_dim:
            raise KvjaxError(f"rope turns {channels} channels of a head; expected at most the {head_dim} that it has")
        if self.scaling == "longrope" and channels:
            for name in ("short_factors", "long_factors"):
                if len(getattr(self, name)) != channels // 2:
                    count = len(getattr(self, name))
                    raise KvjaxError(
                        f"{name} has {count} numbers; expected {channels // 2}, one per pair of channels"
                    )
        if self.scaling == "dynamic" and channels == 2:
            raise KvjaxError("dynamic rope scaling turns 2 channels of a head; expected more")
        if self.scaling == "yarn" and self.theta <= 1:
            raise KvjaxError(f"theta of yarn rope scaling is {self.theta}; expected more than 1")


NO_ROPE = RopeConfig(channels=0)


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
    qk_norm: bool = False  # of queries and keys, each head alone
    whole_qk_norm: bool = False  # that norm is over all heads together
    pre_norm: bool = True  # before attention and before the MLP
    post_norm: bool = False  # after each, before the sum
    activation: str = "silu"  # one of ACTIVATIONS, of the MLP's gate
    embedding_scale: float = 1.0  # of embedded tokens
    residual_scale: float = 1.0  # of what attention and the MLP add
    query_scale: float = 1.0  # of queries, beside the 1 / sqrt(head_dim) of their scores
    logit_scale: float = 1.0  # of final hidden states, and so of logits
    experts: int = 0  # of the MLP, chosen by a router; 0: one MLP for all tokens
    experts_per_token: int = 0
    normalized_experts: bool = True  # the weights of a token's experts add up to 1
    tied: bool = False
    learned_sinks: bool = False  # each head has a score that joins the softmax and adds no value
    window: int | None = None  # sliding window, in tokens
    full_layers: tuple[int, ...] = ()  # layers that attend to all tokens in spite of the window
    window_rope: RopeConfig | None = None  # of the layers with a window; `rope` where None
    nope_layers: tuple[int, ...] = ()  # layers without RoPE

    def __post_init__(self) -> None:
        """Raises KvjaxError for values that are not valid for a decoder."""
        _check_sizes(self, "vocab_size", "model_dim", "mlp_dim", "heads", "kv_heads", "head_dim")
        _check_sizes(self, "layers", most=MOST_LAYERS)
        _check_sizes(self, "max_positions", *(["window"] if self.window is not None else []))
        _check_layers(self, "full_layers", "nope_layers")
        _check_reals(self, "norm_eps", "embedding_scale", "residual_scale", "query_scale", "logit_scale")
        if self.activation not in ACTIVATIONS:
            raise KvjaxError(f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if self.experts:
            _check_sizes(self, "experts")
            _check_sizes(self, "experts_per_token", most=self.experts)
        flags = "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "whole_qk_norm", "pre_norm", "post_norm", "tied"
        for name in (*flags, "normalized_experts", "learned_sinks"):
            if type(value := getattr(self, name)) is not bool:
                raise KvjaxError(f"{name} is {value!r}; expected true or false")
        if self.heads % self.kv_heads:
            raise KvjaxError(f"heads is {self.heads}; expected a multiple of the {self.kv_heads} kv heads")
        if self.head_dim % 2:
            raise KvjaxError(f"head_dim is {self.head_dim}; expected an even number")
        self.rope.check(self.head_dim)
        if self.window_rope is not None:
            self.window_rope.check(self.head_dim)

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Channels that are normalised together, of queries and of keys."""
        if self.whole_qk_norm:
            return self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.head_dim, self.head_dim

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees every token."""
        return None if layer in self.full_layers else self.window

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`layer_window` of every layer; () where no layer has one."""
        each = tuple(map(self.layer_window, range(self.layers)))
        return each if any(each) else ()

    def layer_rope(self, layer: int) -> RopeConfig:
        """The RoPE of one layer."""
        if layer in self.nope_layers:
            return NO_ROPE
        return self.rope if self.window_rope is None or self.layer_window(layer) is None else self.window_rope
