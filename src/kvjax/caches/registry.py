"""The methods that plans may name: the package's own, those of installed packages, those registered by hand."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from kvjax.caches.aqua import Aqua
from kvjax.caches.base import CacheSpec
from kvjax.caches.dense import Dense
from kvjax.caches.floats import FloatKV
from kvjax.caches.gear import Gear
from kvjax.caches.grammar import parse_name, split_list
from kvjax.caches.heads import PerHead
from kvjax.caches.kv import KV
from kvjax.caches.kvarn import KVarN
from kvjax.caches.kvquant import KVQuant
from kvjax.caches.oscar import Oscar
from kvjax.caches.turboquant import TurboQuant
from kvjax.caches.x import X
from kvjax.caches.xcl import XCL
from kvjax.checks import show
from kvjax.errors import KvjaxError
from kvjax.files import brief

BUILT_IN: tuple[type[CacheSpec], ...] = (
    *(Dense, KV, PerHead, X, XCL, FloatKV),
    *(TurboQuant, Oscar, KVarN, Gear, KVQuant, Aqua),
)
GROUP = "kvjax.caches"  # of entry points: each names a CacheSpec class

Method = TypeVar("Method", bound=type[CacheSpec])
_registered: dict[str, type[CacheSpec]] = {}


def register(method: Method) -> Method:
    """Makes a method's names known to every plan; usable as a decorator.

    Registering a class again under its own module and name replaces it, as when a notebook cell is run twice.

    Raises:
      KvjaxError: it is no frozen dataclass of CacheSpec with a form and examples, or its names are taken.
    """
    name = getattr(method, "__name__", "") or show(method)
    if not (isinstance(method, type) and issubclass(method, CacheSpec) and dataclasses.is_dataclass(method)):
        raise KvjaxError(f"{name}: expected a frozen dataclass that inherits from CacheSpec")
    if abstract := sorted(method.__abstractmethods__):
        raise KvjaxError(f"{name}: expected it to define {', '.join(abstract)}")
    if not getattr(method, "form", None) or not method.examples:
        raise KvjaxError(f"{name}: expected a form, such as 'my{{bits}}', and examples for the contract suite")
    required = [f.name for f in dataclasses.fields(method) if f.default is dataclasses.MISSING]
    if unnamed := [field for field in required if f"{{{field}}}" not in method.form]:
        raise KvjaxError(f"{name}: field {unnamed[0]} has no default; expected one, or {{{unnamed[0]}}} in the form")
    key = f"{method.__module__}.{method.__qualname__}"
    for other in methods():
        if f"{other.__module__}.{other.__qualname__}" != key and _overlap(method, other):
            raise KvjaxError(f"{name}: names of the form {method.form} are those of {other.__name__} already")
    _registered[key] = method
    return method


def methods() -> tuple[type[CacheSpec], ...]:
    """All methods: built in, of installed packages, registered."""
    return (*BUILT_IN, *_installed(), *_registered.values())


def parse_spec(text: str) -> CacheSpec:
    """The spec of one method, as in `k4v2@token(sink=4)`.

    Raises:
      KvjaxError: no method has that name, or it does not have that mode, field or value.
    """
    if named := parse_name(text):
        for method in methods():
            if (spec := method.parse(*named)) is not None:
                return spec
    known = ", ".join(form for method in methods() for form in (method.form, *method.aliases))
    raise KvjaxError(f"cache {text.strip()!r} is not known; expected {known}, with @mode and (field=value,...)")


def load_plugins(names: str) -> None:
    """Imports modules that register methods.

    Args:
      names: importable modules or paths of Python files, separated by commas; nothing where empty.

    Raises:
      KvjaxError: it is no text, one cannot be imported, or it registers nothing.
    """
    if not isinstance(names, str):
        raise KvjaxError(f"plugins are of type {type(names).__name__}; expected names separated by commas")
    for name in split_list(names) if names else []:
        before = dict(_registered)
        module = _import(name)
        here = [method for method in _registered.values() if method.__module__ == module.__name__]
        if not here and before == _registered:
            raise KvjaxError(f"plugin {name} registers no cache; expected kvjax.register(...) in it")


def plugins_of(specs: tuple[CacheSpec, ...]) -> list[str]:
    """The modules that must be loaded for these specs' names to be known."""
    return sorted({type(spec).__module__ for spec in specs} & {method.__module__ for method in _registered.values()})


def _overlap(a: type[CacheSpec], b: type[CacheSpec]) -> bool:
    def takes(method: type[CacheSpec], text: str) -> bool:
        named = parse_name(text)
        try:
            return bool(named) and method.parse(named[0], None, {}) is not None  # type: ignore[index]
        except KvjaxError:
            return True  # the name is its own, the settings are not

    return any(takes(a, text) for text in b.examples) or any(takes(b, text) for text in a.examples)


@functools.cache
def _installed() -> tuple[type[CacheSpec], ...]:
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            found.append(entry.load())
        except Exception as error:  # whatever the package's own code raises
            raise KvjaxError(f"entry point {entry.name} of {GROUP} cannot be loaded: {brief(error)}") from None
    return tuple(found)


def _import(name: str) -> ModuleType:
    path = Path(name)
    try:
        if path.suffix != ".py":
            return importlib.import_module(name)
        if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
            return sys.modules[path.stem]
        spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    except KvjaxError:
        raise
    except Exception as error:  # whatever the module's own code raises
        sys.modules.pop(path.stem, None)
        raise KvjaxError(f"plugin {name} cannot be imported: {brief(error)}") from None
