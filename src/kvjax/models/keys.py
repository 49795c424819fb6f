"""Complete lists of the keys of a file: which are read, which are harmless, which are refused by name."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kvjax.errors import KvjaxError
from kvjax.models.config import MOST

# Parts of names that say: this key may change what a decoder computes.
STEMS = (
    *("activation", "alibi", "attention_type", "bias", "bidirectional", "block_type", "chunk", "clamp", "clip"),
    *("conv", "cross_attention", "dense_replace", "diff_attn", "expert", "ffn", "gamma", "glu", "head_dim"),
    *("hidden_act", "interleav", "layer_type", "layers_block", "local_attention", "lora", "mlp_only", "moe"),
    *("multiplier", "mup", "nope", "norm", "parallel_attn", "positional", "position_embedding", "qk_"),
    *("quantization_config", "recurren", "residual", "rope", "rotary", "router", "scal", "shared", "sink"),
    *("skip_layer", "soft_cap", "softcap", "sparse", "ssm", "window"),
)


@dataclasses.dataclass(frozen=True)
class KeyList:
    """What becomes of each key of one kind of file.

    Attributes:
      used: keys that the reader reads.
      harmless: keys that change nothing that the decoder computes.
      neutral: keys that change other decoders, with the values at which they change nothing. null, [] and {} are
        always such values.
      stems: a key in none of these lists is refused where its name holds one of them, unless it is null, false or 0.
    """

    used: Collection[str]
    harmless: Collection[str] = ()
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    stems: tuple[str, ...] = STEMS

    def check(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        """Checks every key of a file.

        Args:
          values: values by key.
          where: the file, for messages.
          prefix: what messages put before a key.

        Raises:
          KvjaxError: a key may change what the decoder computes, and the decoder does not have it.
        """
        for key, value in values.items():
            if key in self.used or key in self.harmless:
                continue
            neutral = self.neutral.get(key, (False,))
            known = key in self.neutral or any(stem in key.lower() for stem in self.stems)
            if known and not _changes_nothing(value, neutral):
                expected = " or ".join(map(repr, (*neutral, None)))
                shown = reprlib.repr(value)
                raise KvjaxError(f"{prefix}{key} of {where} is {shown}, which is not supported; expected {expected}")


def _changes_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is neutral, or an array or list of such values."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return all(_changes_nothing(each, neutral) for each in value)
    return value is None or value == {} or value in neutral


@dataclasses.dataclass(frozen=True)
class Fields:
    """The values of an object in a JSON file, by the kind that they must have. null stands for the default.

    Attributes:
      values: the object.
      where: what messages put after a key, such as ` of rope_scaling`.
    """

    values: Mapping[str, Any]
    where: str = ""

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise KvjaxError(f"{key}{self.where} is missing")
        return default if value is None else value

    def _wrong(self, key: str, expected: str) -> KvjaxError:
        return KvjaxError(f"{key}{self.where} is {reprlib.repr(self.values.get(key))}; expected {expected}")

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number from `least` to `most`; 64.0 is one too. Without a default the key must be there."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not least <= value <= most or value != int(value):
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number below 1e30."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:  # NaN is neither
            raise self._wrong(key, "a positive number")
        return float(value)

    def reals(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers below 1e30; the key must be there."""
        values = self._get(key, None)
        if type(values) is not list or not all(type(x) in (int, float) and 0 < x < 1e30 for x in values):
            raise self._wrong(key, "a list of positive numbers")
        return tuple(map(float, values))

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if type(value) is not str:
            raise self._wrong(key, "a string")
        return value

    def part(self, key: str) -> Fields:
        """The object under a key, empty where the key is absent."""
        value = self._get(key, {})
        if type(value) is not dict:
            raise self._wrong(key, "an object")
        return Fields(value, f" of {key}{self.where}")
