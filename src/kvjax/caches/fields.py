"""Names of specs: text to a frozen dataclass and back, by the fields' own types.

A spec's `form` holds its name, as in `k{key_bits}v{value_bits}`. `@mode` is the field `mode`, and every other field
stands in parentheses where it differs from its default.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from kvjax.errors import KvjaxError

FIRST = ("group", "residual", "sink")  # fields that most methods have stand first, in this order
_PLACE = re.compile(r"\{(\w+)\}")
_INT = r"-?\d{1,9}"
_FLOAT = r"-?\d{1,400}(\.\d{1,400})?(e[-+]?\d{1,3})?"
_WORDS = {True: ("true", "1"), False: ("false", "0")}


def derived(default: Any) -> Any:
    """A field that is filled in (by the model, by the layer below) and is no part of a name."""
    return dataclasses.field(default=default, kw_only=True, metadata={"derived": True})


def parse(method: Any, name: str, mode: str | None, settings: Mapping[str, str]) -> Any:
    """The spec of a name, None where the name is not one of the method's; see `CacheSpec.parse`."""
    for form, preset in ((method.form, {}), *method.aliases.items()):
        if match := re.fullmatch(_pattern(form), name):
            values = {key: _convert(method, name, key, text) for key, text in match.groupdict().items()}
            return method(**(preset | values | _settings(method, name, match, mode, settings)))
    return None


def _settings(
    method: Any, name: str, match: re.Match[str], mode: str | None, settings: Mapping[str, str]
) -> dict[str, Any]:
    if mode is not None and mode not in method.modes:
        expected = f"expected {_either(method.modes)}" if method.modes else "it has no modes"
        raise KvjaxError(f"{name}: mode {mode!r}; {expected}")
    known = [f.name for f in _shown(method) if f.name not in match.groupdict()]
    for key in settings:
        if key not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise KvjaxError(f"{name}: no field {key!r}; expected {expected}")
    stated = {key: _convert(method, name, key, text) for key, text in settings.items()}
    return stated | ({} if mode is None else {"mode": mode})


def to_text(spec: Any) -> str:
    """The canonical name, which `parse` takes back."""
    return _named(spec, spec.form, {})


def short_text(spec: Any) -> str:
    """The name that `parse` takes back with the fewest fields, those under its method's aliases among them."""
    forms = [
        (spec.form, {}),
        *((form, own) for form, own in spec.aliases.items() if own.get("mode") == getattr(spec, "mode", None)),
    ]
    names = [_named(spec, *each) for each in forms]
    return min(names, key=lambda name: name.count("="))  # of equals the method's own, which comes first


def _named(spec: Any, form: str, preset: Mapping[str, Any]) -> str:
    """The name in a form, with what differs from the form's preset and from the defaults."""
    in_name = lambda x: np.format_float_positional(x, trim="-") if isinstance(x, float) else x  # noqa: E731
    name = form.format_map({f.name: in_name(getattr(spec, f.name)) for f in dataclasses.fields(spec)})
    mode = f"@{spec.mode}" if spec.modes and spec.mode not in (None, preset.get("mode")) else ""
    named = _PLACE.findall(form)
    items = [
        f"{f.name}={str(value).lower() if isinstance(value, bool) else value}"
        for f in _shown(type(spec))
        if f.name not in named and (value := getattr(spec, f.name)) != preset.get(f.name, f.default)
    ]
    return name + mode + (f"({','.join(items)})" if items else "")


def check(spec: Any) -> None:
    """Raises KvjaxError for a value that its field's type does not allow, and for a number below 0."""
    for name, allowed in kinds(type(spec)).items():  # type: ignore[arg-type]
        value = getattr(spec, name)
        if name == "mode" and value is not None and spec.modes and value not in spec.modes:
            raise KvjaxError(f"{spec}: mode {value!r}; expected {_either(spec.modes)}")
        if not any(_allows(kind, value) for kind in allowed):
            raise KvjaxError(f"{spec}: {name}={value}; expected {_expected(allowed)}")
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise KvjaxError(f"{spec}: {name}={value}; expected at least 0")


def _shown(method: Any) -> list[dataclasses.Field[Any]]:
    """The fields that stand in parentheses, in their order there; those of the name among them."""
    shown = [f for f in dataclasses.fields(method) if f.name != "mode" and not f.metadata.get("derived")]
    return sorted(shown, key=lambda f: FIRST.index(f.name) if f.name in FIRST else len(FIRST))


@functools.cache
def kinds(method: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each field allows."""
    hints = typing.get_type_hints(method)
    union = lambda hint: typing.get_origin(hint) in (typing.Union, types.UnionType)  # noqa: E731
    fields = {f.name: hints[f.name] for f in dataclasses.fields(method)}
    return {name: typing.get_args(hint) if union(hint) else (hint,) for name, hint in fields.items()}


def _pattern(form: str) -> str:
    parts = _PLACE.split(form)
    number = r"\d{1,400}(?:\.\d{1,400})?"
    return "".join(f"(?P<{part}>{number})" if i % 2 else re.escape(part) for i, part in enumerate(parts))


def _convert(method: Any, name: str, field: str, text: str) -> Any:
    allowed = kinds(method)[field]
    for kind in allowed:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        if found := [choice for choice in choices if str(choice) == text]:
            return found[0]
        if kind is bool and (found := [value for value, words in _WORDS.items() if text in words]):
            return found[0]
        if kind is int and re.fullmatch(_INT, text, re.ASCII):
            return int(text)
        if kind is float and re.fullmatch(_FLOAT, text, re.ASCII):
            return float(text)
        if kind is str:
            return text
    raise KvjaxError(f"{name}: {field}={text}; expected {_expected(allowed)}")


def _allows(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    return isinstance(value, kind) if kind in (str, types.NoneType) else type(value) is kind


def _expected(allowed: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    literal = lambda kind: typing.get_origin(kind) is Literal  # noqa: E731
    return _either(
        _either(typing.get_args(k)) if literal(k) else names[k] for k in allowed if literal(k) or k in names
    )


def _either(choices: Any) -> str:
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last
