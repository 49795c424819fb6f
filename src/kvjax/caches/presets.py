"""Plans by file and by name.

In files `{plan: text, card: ...}` is ours; KVTuner's presets have {layer: {nbits_key, nbits_value}}, or
{layer: {kv head: {nbits_key, nbits_value}}}. What KVTuner ships has names: `kvtuner:llama-3.1-8b-instruct-3.25` is
the model and the mean bits.
"""

from __future__ import annotations

import functools
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvjax.caches.base import CacheSpec
from kvjax.caches.grammar import parse_fields, split_layers
from kvjax.caches.heads import BETWEEN, PerHead
from kvjax.caches.kv import KV
from kvjax.errors import KvjaxError

_MODE = r"(?:@(?P<mode>\w+)(?:\((?P<fields>[^()]*)\))?)?"
FILE = re.compile(rf"(?P<path>.+\.ya?ml){_MODE}")
SHIPPED = re.compile(rf"kvtuner:(?P<name>[\w.-]*){_MODE}")
_FORMS = "expected {layer: {nbits_key, nbits_value}} for every layer, or such a pair by kv head, or {plan: text}"


class _Loader(yaml.SafeLoader):
    """Without merge keys (<<): a few of them, nested, make a value of any size."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


class Shipped(NamedTuple):
    """A plan that KVTuner ships: the model, its file without .yaml, and every layer's pair, as in k4v2."""

    model: str
    file: str
    bits: dict[int, str]

    @property
    def mode(self) -> str:
        """What it was searched for."""
        return "token" if "pertoken" in self.file else "kivi"

    @property
    def name(self) -> str:
        """The model and the mean bits, halves of .01 rounded up."""
        widths = [int(width) for pair in self.bits.values() for width in re.findall(r"\d", pair)]
        return f"{self.model.lower()}-{sum(widths) / len(widths) + 1e-9:.2f}"


@functools.cache
def shipped() -> tuple[Shipped, ...]:
    """KVTuner's own plans."""
    data = yaml.safe_load(resources.files("kvjax.caches").joinpath("kvtuner.yaml").read_text(encoding="utf-8"))
    plans = ((model, file, text) for model, texts in data.items() for file, text in texts.items())
    return tuple(Shipped(model, file, dict(split_layers(text, 1000))) for model, file, text in plans)


def shipped_plan(name: str, mode: str | None, fields: str | None) -> dict[int, CacheSpec]:
    """The specs of the layers of a plan that KVTuner ships.

    Args:
      name: the model and the plan's mean bits, as in `llama-3.1-8b-instruct-3.25`.
      mode: which it was searched for, or another one to use it in; may be None where one plan has the name.
      fields: of all layers, as in `group=64,sink=4`.

    Raises:
      KvjaxError: no plan has the name, or plans of both modes have it and none is named.
    """
    found = [plan for plan in shipped() if plan.name == name.lower()]
    if not found:
        near = [plan for plan in shipped() if plan.model.lower() in name.lower()] or shipped()
        raise KvjaxError(f"kvtuner:{name} is not known; expected {', '.join(dict.fromkeys(p.name for p in near))}")
    modes = list(dict.fromkeys(plan.mode for plan in found))
    if mode is None and len(modes) > 1:
        raise KvjaxError(f"kvtuner:{name} is there in two modes; expected @{' or @'.join(modes)} behind it")
    plan = next((plan for plan in found if plan.mode == mode), found[0])
    return {layer: _pair(pair, mode or plan.mode, fields) for layer, pair in plan.bits.items()}


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
    if not isinstance(bits, dict) or not bits:
        raise KvjaxError(f"layer {layer}: {_FORMS}")
    if any(isinstance(head, str) for head in bits):
        return _pair(_widths(bits, f"layer {layer}"), mode, fields)
    if {*bits} != {*range(len(bits))}:
        raise KvjaxError(f"layer {layer}: expected kv heads from 0 on, each once")
    return _pair(BETWEEN.join(_widths(bits[i], f"layer {layer}, head {i}") for i in range(len(bits))), mode, fields)


def _widths(bits: Any, where: str) -> str:
    """A pair's name, as in k4v2."""
    if not isinstance(bits, dict) or set(bits) != {"nbits_key", "nbits_value"}:
        raise KvjaxError(f"{where}: {_FORMS}")
    if any(type(width) is not int or not 0 <= width < 100 for width in bits.values()):
        raise KvjaxError(f"{where}: expected whole numbers of bits")
    return f"k{bits['nbits_key']}v{bits['nbits_value']}"


def _pair(bits: str, mode: str, fields: str | None) -> CacheSpec:
    spec = (PerHead if BETWEEN in bits else KV).parse(bits, mode, parse_fields(fields))
    assert spec is not None
    return spec


def to_preset(specs: tuple[CacheSpec, ...]) -> str:
    """KVTuner's YAML of a plan: bits per layer, or per layer and kv head where heads differ; no mode and no fields.

    Raises:
      KvjaxError: a layer whose cache is not quantised KV.
    """
    rows: dict[int, dict[Any, Any]] = {}
    for i, spec in enumerate(specs):
        if isinstance(spec, PerHead):
            rows[i] = {head: _row(pair) for head, pair in enumerate(spec.pairs)}
        elif isinstance(spec, KV):
            rows[i] = _row(spec)
        else:
            raise KvjaxError(f"layer {i} is {spec}; KVTuner's presets hold k{{bits}}v{{bits}} only")
    return yaml.safe_dump(rows, sort_keys=True)


def _row(pair: KV) -> dict[str, int]:
    return {"nbits_key": pair.key_bits, "nbits_value": pair.value_bits}
