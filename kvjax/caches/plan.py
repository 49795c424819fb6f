"""Which cache each layer has, and the one grammar that says so everywhere.

    dense   k8v4   k4v2@token   k4v4@kivi(group=64,residual=128,sink=4)     one method for all layers
    0:k8v8;1-2+29:k4v4;3-28:k4v2@kivi                                       per layer; gaps and overlaps are errors
    path/plan.yaml   PRESET.yaml@token                                      a file: ours, or one of KVTuner's presets

Plans in a list are separated by commas outside parentheses.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from jaxtyping import Array, Int

from kvjax.caches.base import REAL_DTYPE, Cache, CacheShape, CacheSpec, ModelShapes
from kvjax.caches.dense import Dense
from kvjax.caches.kv import KV
from kvjax.caches.x import X
from kvjax.caches.xcl import XCL
from kvjax.errors import KvjaxError

METHODS: tuple[type[CacheSpec], ...] = (Dense, KV, X, XCL)
DEFAULT_STREAM = 32  # tokens per streaming chunk where no layer has a residual

_FILE_FORMS = "expected {layer: {nbits_key, nbits_value}} for every layer, or {plan: text}"
_METHOD = re.compile(r"(?P<name>\w+)(?:@(?P<mode>\w+))?(?:\((?P<fields>[^()]*)\))?")
_FILE = re.compile(r"(?P<path>.+\.ya?ml)(?:@(?P<mode>\w+)(?:\((?P<fields>[^()]*)\))?)?")


def parse_spec(text: str) -> CacheSpec:
    """The spec of one method, as in `k4v2@token(sink=4)`."""
    match = _METHOD.fullmatch(text.strip())
    if match:
        for method in METHODS:
            if re.fullmatch(method.pattern, match["name"]):
                return method.parse(match["name"], match["mode"], _fields(match["fields"]))
    known = "dense, k{bits}v{bits}, x{bits}, xcl{bits}"
    raise KvjaxError(f"cache {text.strip()!r} is not known; expected {known} with @mode and (field=value,...)")


def _fields(text: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for item in (text or "").split(",") if text else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value) or key in fields:
            raise KvjaxError(f"cache field {item.strip()!r}; expected field=value, each field once")
        fields[key] = int(value) if re.fullmatch(r"-?\d{1,9}", value) else value
    return fields


def split_list(text: str) -> list[str]:
    """Splits a list of plans at the commas outside parentheses."""
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    if not all(parts):
        raise KvjaxError(f"list of caches {text!r}: expected names separated by single commas")
    return parts


def _layers(text: str, layers: int) -> list[int]:
    out: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise KvjaxError(f"layers {text!r}: expected numbers and ranges joined by +, as in 0-2+29")
        last = int(match[2] or match[1])
        if last >= layers:
            raise KvjaxError(f"{text!r} names layer {last}; the model has {layers} layers")
        out += range(int(match[1]), last + 1)
    return out


class _Loader(yaml.SafeLoader):
    """Without merge keys (<<): a few of them, nested, make a value of any size."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """One CacheSpec per layer."""

    specs: tuple[CacheSpec, ...]

    @classmethod
    def parse(cls, text: str, model: ModelShapes) -> CachePlan:
        """The plan of a text of the grammar above, for a model (its config, or anything that tells the same sizes).

        Raises:
          KvjaxError: an unknown method, mode, field or width; gaps, overlaps or layers beyond the model.
        """
        text = text.strip()
        if match := _FILE.fullmatch(text):
            path = Path(match["path"])
            try:
                return cls._read(path, match["mode"], match["fields"], model)
            except KvjaxError as error:
                raise KvjaxError(f"plan {path}: {error}") from None
        if ":" not in text and ";" not in text:
            return cls.of((parse_spec(text),) * model.layers, model)
        specs: dict[int, CacheSpec] = {}
        for segment in text.split(";"):
            where, colon, method = segment.partition(":")
            if not colon:
                raise KvjaxError(f"plan segment {segment.strip()!r}: expected layers:method, as in 0-2:k8v4")
            spec = parse_spec(method)
            for layer in _layers(where, model.layers):
                if layer in specs:
                    raise KvjaxError(f"plan {text!r} names layer {layer} twice")
                specs[layer] = spec
        return cls._complete(specs, model, f"plan {text!r}")

    @classmethod
    def of(cls, specs: Sequence[CacheSpec], model: ModelShapes) -> CachePlan:
        """The plan of one spec per layer, settled for the model and in place."""
        placed: list[CacheSpec] = []
        for spec in specs:
            placed.append(spec.settle(model).placed(placed[-1] if placed else None))
        for spec, above in zip(placed, [*placed[1:], None], strict=True):
            spec.check_below(above)
        return cls(tuple(placed))

    @classmethod
    def _complete(cls, specs: Mapping[int, CacheSpec], model: ModelShapes, where: str) -> CachePlan:
        layers = model.layers
        missing = sorted(set(range(layers)) - set(specs))
        beyond = sorted(set(specs) - set(range(layers)))
        if missing:
            raise KvjaxError(f"{where} has no cache for layer {missing[0]} of the model's {layers} layers")
        if beyond:
            raise KvjaxError(f"{where} names layer {beyond[0]}; the model has {layers} layers")
        return cls.of([specs[i] for i in range(layers)], model)

    @classmethod
    def _read(cls, path: Path, mode: str | None, fields: str | None, model: ModelShapes) -> CachePlan:
        """A KVTuner preset, {layer: {nbits_key, nbits_value}}, or a file of ours, {plan: text}."""
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except Exception as error:  # the library's constructors raise many kinds
            raise KvjaxError(" ".join(str(error).split())) from None
        if not isinstance(data, dict) or not data:
            raise KvjaxError(_FILE_FORMS)
        if "plan" in data:
            inner = data["plan"]
            if mode or not isinstance(inner, str) or _FILE.fullmatch(inner.strip()):
                raise KvjaxError("expected a text that names its modes itself, and no @mode")
            return cls.parse(inner, model)
        mode = mode or ("token" if "pertoken" in path.name else "kivi")
        specs: dict[int, CacheSpec] = {}
        for layer, bits in data.items():
            if type(layer) is not int or not 0 <= layer < 10**6:
                raise KvjaxError(f"one of its layers is no number of a layer; {_FILE_FORMS}")
            if not isinstance(bits, dict) or set(bits) != {"nbits_key", "nbits_value"}:
                raise KvjaxError(f"layer {layer}: {_FILE_FORMS}")
            if any(type(width) is not int or not 0 <= width < 100 for width in bits.values()):
                raise KvjaxError(f"layer {layer}: expected whole numbers of bits")
            specs[layer] = KV.parse(f"k{bits['nbits_key']}v{bits['nbits_value']}", mode, _fields(fields))
        return cls._complete(specs, model, "the file")

    def preset(self) -> str:
        """KVTuner's YAML of this plan: bits per layer, without mode and fields.

        Raises:
          KvjaxError: a layer whose cache is not quantised KV.
        """
        rows: dict[int, dict[str, int]] = {}
        for i, spec in enumerate(self.specs):
            if type(spec) is not KV:
                raise KvjaxError(f"layer {i} is {spec}; KVTuner's presets hold k{{bits}}v{{bits}} only")
            rows[i] = {"nbits_key": spec.key_bits, "nbits_value": spec.value_bits}
        return yaml.safe_dump(rows, sort_keys=True)

    def __str__(self) -> str:
        """Canonical form: names every mode, and parses back."""
        where: dict[str, list[int]] = {}
        for i, spec in enumerate(self.specs):
            where.setdefault(str(spec), []).append(i)
        if len(where) == 1:
            return str(self.specs[0])
        return ";".join(f"{_ranges(layers)}:{spec}" for spec, layers in where.items())

    def describe(self, shape: CacheShape, length: Int[Array, "B"]) -> str:
        """A table: method, bits, allocated bytes and fill of each run of layers."""
        stored = [int(n) for n in length]
        fill = sum(stored) / (shape.batch * shape.max_len)
        rows = [("layers", "cache", "bits", "with scales", "bytes a layer", "fill")]
        for spec, layers in self._where().items():
            figures = f"{spec.bits_nominal:.2f}", f"{spec.bits_asymptotic(shape):.2f}", f"{spec.nbytes(shape):,}"
            rows.append((_ranges(layers), str(spec), *figures, f"{fill:.0%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = (
            [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            for row in rows
        )
        total = f"{self.nbytes(shape):,} bytes in {shape.dtype}, {self.bits_real(shape):.2f} real bits per element"
        holds = f"{' + '.join(map(str, stored))} of {shape.batch} x {shape.max_len} tokens"
        return "\n".join([f"{holds}, {total}", *("  ".join(row).rstrip() for row in aligned)])

    def init(self, shape: CacheShape) -> Cache:
        """An empty cache for every layer."""
        layers = tuple(spec.init(shape) for spec in self.specs)
        return Cache(layers, jnp.zeros((shape.batch,), jnp.int32), self, shape)

    def init_carry(self, shape: CacheShape) -> Any:
        """What runs across the layers within one step, the same tree at every layer; () where nothing does."""
        carries = [spec.init_carry(shape) for spec in self._counts()]
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(carry)) for carry in carries]
        return carries[sizes.index(max(sizes))]  # runs with residuals of their own: the longest serves all

    def init_shapes(self, shape: CacheShape) -> Any:
        """The tree of `init` without its arrays. Raises KvjaxError where a spec does not fit the shape."""
        return jax.eval_shape(lambda: self.init(shape))

    def nbytes(self, shape: CacheShape) -> int:
        """Allocated bytes of all layers."""
        return sum(count * spec.nbytes(shape) for spec, count in self._counts().items())

    @property
    def bits_nominal(self) -> float:
        """Mean code bits of K and V over the layers (KVTuner's f_m)."""
        return self._mean(lambda spec: spec.bits_nominal)

    def bits_asymptotic(self, shape: CacheShape) -> float:
        """Mean bits per element, scales and zero points included, at long context."""
        return self._mean(lambda spec: spec.bits_asymptotic(shape))

    def bits_real(self, shape: CacheShape) -> float:
        """Allocated bits per element of `shape.max_len` tokens, what is unquantised counted as 16 bits."""
        real = dataclasses.replace(shape, dtype=REAL_DTYPE)
        elements = shape.batch * shape.max_len * shape.elements_per_token * len(self.specs)
        return 8 * self.nbytes(real) / elements

    @property
    def stream_chunk(self) -> int:
        """Tokens per streaming chunk: the gcd of the residuals that are not 0."""
        return math.gcd(*(spec.block for spec in self.specs)) or DEFAULT_STREAM

    def _where(self) -> dict[CacheSpec, list[int]]:
        """The layers of each spec, in order of appearance."""
        where: dict[CacheSpec, list[int]] = {}
        for i, spec in enumerate(self.specs):
            where.setdefault(spec, []).append(i)
        return where

    def _counts(self) -> dict[CacheSpec, int]:
        return {spec: len(layers) for spec, layers in self._where().items()}

    def _mean(self, figure: Callable[[CacheSpec], float]) -> float:
        return sum(count * figure(spec) for spec, count in self._counts().items()) / len(self.specs)


def _ranges(layers: list[int]) -> str:
    parts: list[str] = []
    for i in layers:
        if parts and int(parts[-1].split("-")[-1]) == i - 1:
            parts[-1] = f"{parts[-1].split('-')[0]}-{i}"
        else:
            parts.append(str(i))
    return "+".join(parts)


def logical_axes(plan: CachePlan, shape: CacheShape) -> Any:
    """The tree of `plan.init(shape).layers`, leaves PartitionSpecs of logical axis names."""
    return tuple(spec.logical_axes(shape) for spec in plan.specs)


def shardings(plan: CachePlan, shape: CacheShape, mesh: jax.sharding.Mesh, rules: Mapping[str, str | None]) -> Any:
    """NamedShardings of `plan.init(shape).layers`: `rules` maps logical axes (batch, kv_heads) to mesh axes."""

    def place(axes: jax.sharding.PartitionSpec) -> jax.sharding.NamedSharding:
        physical = (rules.get(axis) if axis else None for axis in axes)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*physical))

    leaf = lambda node: isinstance(node, jax.sharding.PartitionSpec)  # noqa: E731
    return jax.tree.map(place, logical_axes(plan, shape), is_leaf=leaf)
