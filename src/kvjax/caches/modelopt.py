"""Plans in NVIDIA ModelOpt's metadata, which vLLM and TensorRT-LLM read: hf_quant_config.json, or a config.json.

Schema 1 names the format of every quantised attention module (ModelOpt's pull request 2272, vLLM's RFC 57445):

    {"producer": {"name": "modelopt", "version": ...},
     "quantization": {"quant_algo": null, "quantized_layers": {}, "exclude_modules": [],
                      "kv_cache_quant_algo": "MIXED_PRECISION", "kv_cache_schema_version": 1,
                      "kv_cache_quantized_layers": {"model.layers.0.self_attn": {"quant_algo": "FP8"}, ...}}}

A config.json has the same in `quantization_config`, without the envelope. Older files say MIXED_PRECISION for
`quant_algo` as well, and files of one format have no map of layers. What no format is named for is not quantised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.caches.base import CacheSpec
from kvjax.caches.dense import Dense
from kvjax.caches.floats import FloatKV
from kvjax.checks import show
from kvjax.errors import KvjaxError

FORMATS = {"FP8": FloatKV(8, 8), "NVFP4": FloatKV(4, 4), "FP8_K_NVFP4_V": FloatKV(8, 4)}
MIXED = "MIXED_PRECISION"
SCHEMA = 1
PRODUCER = {"name": "modelopt", "version": f"schema {SCHEMA}, written by kvjax"}  # readers look for this name
FILE = re.compile(r"(?P<path>.+\.json)")
_MODULE = re.compile(r"(?:.+\.)?layers\.(?P<layer>\d{1,6})\.\w*attn\w*")
_SCHEMES = {("float", 8): "FP8", ("float", 4): "NVFP4"}  # of `kv_cache_scheme`, by type and num_bits


def read(data: Any, layers: int) -> dict[int, CacheSpec]:
    """The specs of the layers of a file.

    Args:
      data: what the JSON file holds.
      layers: of the model.

    Raises:
      KvjaxError: it is no such metadata, or names a format, a schema or a layer that is not known.
    """
    found = _quantization(data)
    if (version := found.get("kv_cache_schema_version", SCHEMA)) != SCHEMA:
        raise KvjaxError(f"kv_cache_schema_version={show(version)}; expected {SCHEMA}")
    named = found.get("kv_cache_quantized_layers")
    specs: dict[int, CacheSpec] = dict.fromkeys(range(layers), Dense())
    if named is None:
        return dict.fromkeys(range(layers), _format(_everywhere(found), "kv_cache_quant_algo"))
    if not isinstance(named, dict) or not named:
        raise KvjaxError("kv_cache_quantized_layers is empty or no map; expected a format for every quantised module")
    for module, entry in named.items():
        match = _MODULE.fullmatch(module)
        layer = int(match["layer"]) if match else layers
        if layer >= layers:
            raise KvjaxError(f"module {show(module)}; expected attention of one of the model's {layers} layers")
        specs[layer] = _format(entry.get("quant_algo") if isinstance(entry, dict) else entry, module)
    return specs


def _quantization(data: Any) -> Mapping[str, Any]:
    """The metadata itself, out of its envelope."""
    envelopes = ("quantization", "quantization_config")
    found = next((data[key] for key in envelopes if key in data), data) if isinstance(data, dict) else None
    keys = ("kv_cache_quant_algo", "kv_cache_quantized_layers", "kv_cache_scheme")
    if not isinstance(found, dict) or not any(found.get(key) for key in keys):
        raise KvjaxError(f"expected ModelOpt's metadata, with {' or '.join(keys)}")
    return found


def _everywhere(found: Mapping[str, Any]) -> Any:
    """The format of all layers, where no layer has one of its own."""
    if "kv_cache_quant_algo" in found:
        return found["kv_cache_quant_algo"]
    scheme = found["kv_cache_scheme"]
    if not isinstance(scheme, dict):
        return scheme
    return _SCHEMES.get((scheme.get("type"), scheme.get("num_bits")), scheme)  # type: ignore[arg-type]


def _format(name: Any, where: str) -> CacheSpec:
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise KvjaxError(f"{where}: format {show(name)}; expected {', '.join(FORMATS)}")


def says(specs: Sequence[CacheSpec]) -> bool:
    """Whether this metadata can say a plan: layers are dense or of its formats, and not all dense."""
    return {*specs} <= {Dense(), *FORMATS.values()} and {*specs} != {Dense()}


def to_json(specs: Sequence[CacheSpec]) -> str:
    """hf_quant_config.json of a plan: the cache alone, weights as they are.

    Raises:
      KvjaxError: a layer is neither dense nor one of ModelOpt's formats, or all are dense.
    """
    names = {spec: name for name, spec in FORMATS.items()}
    for i, spec in enumerate(specs):
        if spec not in names and not isinstance(spec, Dense):
            raise KvjaxError(f"layer {i} is {spec}; ModelOpt names dense, {', '.join(map(str, names))} only")
    formats = {f"model.layers.{i}.self_attn": names[spec] for i, spec in enumerate(specs) if spec in names}
    if not formats:
        raise KvjaxError("no layer is quantised; expected one at least")
    uniform = len(formats) == len(specs) and len({*formats.values()}) == 1
    quantization: dict[str, Any] = {
        "quant_algo": None,
        "quantized_layers": {},
        "exclude_modules": [],
        "kv_cache_quant_algo": next(iter(formats.values())) if uniform else MIXED,
        "kv_cache_quantized_layers": {module: {"quant_algo": name} for module, name in formats.items()},
        "kv_cache_schema_version": SCHEMA,
    }
    return json.dumps({"producer": PRODUCER, "quantization": quantization}, indent=2) + "\n"
