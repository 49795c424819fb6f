"""The text of plans: methods with their modes and fields, layers, lists.

    dense   k8v4   k4v2@token   k4v4@kivi(group=64,residual=128,sink=4)     one method for all layers
    k8v4/k4v2/k4v2@kivi                                                     a pair for each kv head
    0:k8v8;1-2+29:k4v4;3-28:k4v2@kivi                                       per layer; gaps and overlaps are errors
    sliding:dense;full:k4v2                                                 by whether a layer has a sliding window
    path/plan.yaml   PRESET.yaml@token                                      a file: ours, or one of KVTuner's presets
    path/hf_quant_config.json   path/config.json                           what NVIDIA ModelOpt writes for vLLM
    kvtuner:llama-3.1-8b-instruct-3.25   kvtuner:qwen2.5-7b-instruct-4.00@kivi   a plan that KVTuner ships

Plans in a list are separated by commas outside parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from kvjax.errors import KvjaxError

NO_KINDS: Mapping[str, list[int]] = MappingProxyType({})
_METHOD = re.compile(r"(?P<name>[\w./]+)(?:@(?P<mode>\w+))?(?:\((?P<fields>[^()]*)\))?")


def parse_name(text: str) -> tuple[str, str | None, dict[str, str]] | None:
    """Name, mode and fields of one method, None where the text has another form.

    Raises:
      KvjaxError: fields that are not field=value, each once.
    """
    match = _METHOD.fullmatch(text.strip())
    return (match["name"], match["mode"], parse_fields(match["fields"])) if match else None


def parse_fields(text: str | None) -> dict[str, str]:
    """The fields of `field=value,...`."""
    fields: dict[str, str] = {}
    for item in (text or "").split(",") if text else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value) or key in fields:
            raise KvjaxError(f"field {item.strip()!r}; expected field=value, each field once")
        fields[key] = value
    return fields


def split_list(text: str, of: str = "caches") -> list[str]:
    """Splits a list at the commas outside parentheses; `of` says what it lists, for the message."""
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    if not all(parts):
        raise KvjaxError(f"list of {of} {text!r}: expected names separated by single commas")
    return parts


def split_layers(text: str, layers: int, kinds: Mapping[str, list[int]] = NO_KINDS) -> Iterator[tuple[int, str]]:
    """Each layer of `layers:method;...` with its method, in order of appearance.

    Args:
      text: segments joined by semicolons.
      layers: layers of the model.
      kinds: those of each kind, by name.

    Raises:
      KvjaxError: a segment of another form, a layer named twice or beyond the model's, a kind of which it has none.
    """
    seen: set[int] = set()
    for segment in text.split(";"):
        where, colon, method = segment.partition(":")
        if not colon:
            raise KvjaxError(f"plan segment {segment.strip()!r}: expected layers:method, as in 0-2:k8v4")
        for layer in _layer_numbers(where, layers, kinds):
            if layer in seen:
                raise KvjaxError(f"plan {text!r} names layer {layer} twice")
            seen.add(layer)
            yield layer, method


def _layer_numbers(text: str, layers: int, kinds: Mapping[str, list[int]]) -> list[int]:
    out: list[int] = []
    for part in text.split("+"):
        if (kind := part.strip()) in kinds:
            if not kinds[kind]:
                raise KvjaxError(f"layers {text!r}: the model has no {kind} layers; expected numbers, as in 0-2+29")
            out += kinds[kind]
            continue
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise KvjaxError(f"layers {text!r}: expected numbers and ranges joined by +, as in 0-2+29, or kinds")
        last = int(match[2] or match[1])
        if last >= layers:
            raise KvjaxError(f"{text!r} names layer {last}; the model has {layers} layers")
        out += range(int(match[1]), last + 1)
    return out


def join_layers(methods: Mapping[str, list[int]]) -> str:
    """The text of each method's layers; the method alone where there is one."""
    if len(methods) == 1:
        return next(iter(methods))
    return ";".join(f"{format_layers(layers)}:{method}" for method, layers in methods.items())


def format_layers(layers: list[int]) -> str:
    """Numbers and ranges joined by +."""
    parts: list[str] = []
    for i in layers:
        if parts and int(parts[-1].split("-")[-1]) == i - 1:
            parts[-1] = f"{parts[-1].split('-')[0]}-{i}"
        else:
            parts.append(str(i))
    return "+".join(parts)
