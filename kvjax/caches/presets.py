"""Plans in files: `{plan: text, card: ...}` is ours; KVTuner's presets have {layer: {nbits_key, nbits_value}}."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kvjax.caches.base import CacheSpec
from kvjax.caches.grammar import parse_fields
from kvjax.caches.kv import KV
from kvjax.errors import KvjaxError

FILE = re.compile(r"(?P<path>.+\.ya?ml)(?:@(?P<mode>\w+)(?:\((?P<fields>[^()]*)\))?)?")
_FORMS = "expected {layer: {nbits_key, nbits_value}} for every layer, or {plan: text}"


class _Loader(yaml.SafeLoader):
    """Without merge keys (<<): a few of them, nested, make a value of any size."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


def read_plan(path: Path, mode: str | None, fields: str | None) -> str | dict[int, CacheSpec]:
    """The text of a file of ours, or the specs of a preset's layers.

    Args:
      path: the YAML file.
      mode: of a preset's layers; where None, a file name with `pertoken` means token and any other kivi.
      fields: of a preset's layers, as in `group=64,sink=4`.

    Raises:
      KvjaxError: it cannot be read, or it is neither.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # the library's constructors raise many kinds
        raise KvjaxError(" ".join(str(error).split())) from None
    if not isinstance(data, dict) or not data:
        raise KvjaxError(_FORMS)
    if "plan" not in data:
        mode = mode or ("token" if "pertoken" in path.name else "kivi")
        return {layer: _preset_spec(layer, bits, mode, fields) for layer, bits in data.items()}
    text = data["plan"]
    if mode or not isinstance(text, str) or FILE.fullmatch(text.strip()):
        raise KvjaxError("expected a text that names its modes itself, and no @mode")
    return text


def named_plugins(path: Path) -> list[str]:
    """The plugins that the card of a readable plan file names."""
    card = yaml.load(path.read_text(encoding="utf-8"), _Loader).get("card")
    names = card.get("plugins") if isinstance(card, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _preset_spec(layer: Any, bits: Any, mode: str, fields: str | None) -> CacheSpec:
    if type(layer) is not int or not 0 <= layer < 10**6:
        raise KvjaxError(f"one of its layers is no number of a layer; {_FORMS}")
    if not isinstance(bits, dict) or set(bits) != {"nbits_key", "nbits_value"}:
        raise KvjaxError(f"layer {layer}: {_FORMS}")
    if any(type(width) is not int or not 0 <= width < 100 for width in bits.values()):
        raise KvjaxError(f"layer {layer}: expected whole numbers of bits")
    spec = KV.parse(f"k{bits['nbits_key']}v{bits['nbits_value']}", mode, parse_fields(fields))
    assert spec is not None
    return spec


def to_preset(specs: tuple[CacheSpec, ...]) -> str:
    """KVTuner's YAML of a plan: bits per layer, without mode and fields.

    Raises:
      KvjaxError: a layer whose cache is not quantised KV.
    """
    rows: dict[int, dict[str, int]] = {}
    for i, spec in enumerate(specs):
        if not isinstance(spec, KV):
            raise KvjaxError(f"layer {i} is {spec}; KVTuner's presets hold k{{bits}}v{{bits}} only")
        rows[i] = {"nbits_key": spec.key_bits, "nbits_value": spec.value_bits}
    return yaml.safe_dump(rows, sort_keys=True)
