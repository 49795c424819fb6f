"""Which cache each layer of a model has, and what a model holds for a batch of sequences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from kvjax.caches import cross_layer, modelopt, presets
from kvjax.caches.base import REAL_DTYPE, CacheShape, CacheSpec, LayerCache, ModelShapes, ModelSizes
from kvjax.caches.grammar import format_layers, join_layers, split_layers
from kvjax.caches.registry import parse_spec
from kvjax.checks import check_whole, show
from kvjax.errors import KvjaxError
from kvjax.files import read_json
from kvjax.mesh import BATCH, Layout, part_nbytes
from kvjax.tables import align_columns, format_ratio

DEFAULT_STREAM = 32  # tokens per streaming chunk where every layer allows any
TABLE_CONTEXT = 8192  # tokens that a plan's table counts bytes for


@dataclasses.dataclass(frozen=True, repr=False)
class CachePlan:
    """One CacheSpec per layer of a model of these sizes."""

    specs: tuple[CacheSpec, ...]
    model: ModelSizes

    @classmethod
    def parse(cls, text: str, model: ModelShapes) -> CachePlan:
        """The plan of a text of `kvjax.caches.grammar`, for a model (its config, or anything with the same sizes).

        Raises:
          KvjaxError: an unknown method, mode, field or width; gaps, overlaps or layers beyond the model.
        """
        if not isinstance(text, str):
            raise KvjaxError(f"the plan is of type {type(text).__name__}; expected a text")
        text, model = text.strip(), ModelSizes.of(model)
        if match := presets.SHIPPED.fullmatch(text):
            return cls._complete(presets.shipped_plan(**match.groupdict()), model, f"plan {text}")
        if match := presets.FILE.fullmatch(text):
            return cls._of_file(Path(match["path"]), match["mode"], match["fields"], model)
        if match := modelopt.FILE.fullmatch(text):
            return cls._of_modelopt(Path(match["path"]), model)
        if ":" not in text and ";" not in text:
            return cls.of((parse_spec(text),) * model.layers, model)
        segments = split_layers(text, model.layers, ModelSizes.of(model).kinds)
        specs = {layer: parse_spec(method) for layer, method in segments}
        return cls._complete(specs, model, f"plan {text!r}")

    @classmethod
    def cast(cls, cache: str | CacheSpec | CachePlan, model: ModelShapes) -> CachePlan:
        """The plan of a name, of one spec for all layers, or of a plan, for a model.

        Raises:
          KvjaxError: it does not fit the model, was made for a model of other sizes, or is something else.
        """
        if isinstance(cache, str):
            return cls.parse(cache, model)
        if isinstance(cache, CacheSpec):
            return cls.uniform(cache, model)
        if not isinstance(cache, CachePlan):
            raise KvjaxError(
                f"the cache is of type {type(cache).__name__}; expected a name, a CacheSpec or a CachePlan"
            )
        if cache.model != ModelSizes.of(model):
            raise KvjaxError(f"the plan {cache} is for {cache.model}; this model has {ModelSizes.of(model)}")
        return cache

    @classmethod
    def of(cls, specs: Sequence[CacheSpec], model: ModelShapes) -> CachePlan:
        """The plan of one spec per layer, resolved for the model, each on top of the one below.

        Raises:
          KvjaxError: a spec does not fit the model or its neighbours.
        """
        stacked: list[CacheSpec] = []
        for spec in specs:
            stacked.append(cross_layer.stack(spec.resolve(model), stacked[-1] if stacked else None))
        for spec, above in zip(stacked, [*stacked[1:], None], strict=True):
            cross_layer.validate_top(spec, above)
        return cls(tuple(stacked), ModelSizes.of(model))

    @classmethod
    def uniform(cls, spec: CacheSpec, model: ModelShapes) -> CachePlan:
        """The plan of one spec for all layers."""
        return cls.of((spec,) * model.layers, model)

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
    def _of_file(cls, path: Path, mode: str | None, fields: str | None, model: ModelShapes) -> CachePlan:
        try:
            found = presets.read_plan(path, mode, fields)
            if isinstance(found, dict):
                return cls._complete(found, model, "the file")
            try:
                return cls.parse(found, model)
            except KvjaxError as error:
                # A file's modules are named, and never imported by themselves: a plan must not run code.
                needed = ", ".join(presets.named_plugins(path))
                raise KvjaxError(f"{error}; its card names plugins={needed}" if needed else str(error)) from None
        except KvjaxError as error:
            raise KvjaxError(f"plan {path}: {error}") from None

    @classmethod
    def _of_modelopt(cls, path: Path, model: ModelShapes) -> CachePlan:
        data = read_json(path)
        try:
            return cls._complete(modelopt.read(data, model.layers), model, "the file")
        except KvjaxError as error:
            raise KvjaxError(f"plan {path}: {error}") from None

    def __str__(self) -> str:
        """Canonical form: names every mode, and parses back."""
        methods: dict[str, list[int]] = {}
        for i, spec in enumerate(self.specs):
            methods.setdefault(str(spec), []).append(i)
        return join_layers(methods)

    def __repr__(self) -> str:
        return f"<CachePlan {self}: {len(self.specs)} layers, {self.bits_asymptotic:.2f} bits with scales>"

    def preset(self) -> str:
        """KVTuner's YAML of this plan. Raises KvjaxError where a layer's cache is not quantised KV."""
        return presets.to_preset(self.specs)

    def modelopt(self) -> str:
        """ModelOpt's hf_quant_config.json of this plan. Raises KvjaxError where a layer has none of its formats."""
        return modelopt.to_json(self.specs)

    # ---- caches

    def shape(self, batch: int, max_len: int, dtype: Any) -> CacheShape:
        """The sizes of each layer's cache.

        Args:
          batch: sequences.
          max_len: tokens a sequence.
          dtype: of what is unquantised.

        Raises:
          KvjaxError: no whole numbers from 1 to 2**31 - 1, or no dtype.
        """
        batch, max_len = (check_whole(*each, 1) for each in (("batch", batch), ("context", max_len)))
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise KvjaxError(f"dtype={show(dtype)}; expected float32, bfloat16 or float64") from None
        return CacheShape.of(self.model, batch, max_len, dtype)

    def init(self, shape: CacheShape) -> Cache:
        """An empty cache for every layer."""
        layers = tuple(spec.init(each) for spec, each in self.each(shape))
        return Cache(layers, jnp.zeros((shape.batch,), jnp.int32), self, shape)

    def init_carry(self, shape: CacheShape) -> Any:
        """What runs across the layers within one step, the same tree at every layer; () where nothing does."""
        carries = cross_layer.init_carries(list(dict.fromkeys(self.specs)), shape)
        merged: dict[str, Any] = {}
        for name, rows in (item for carry in carries for item in carry.items()):
            if shape.parts > 1 and name in merged and rows.shape != merged[name].shape:
                what = "its runs of layers have different residuals; expected one residual under a mesh with seq"
                raise KvjaxError(f"{self}: {what}")
            # Runs with residuals of their own: the longest serves all.
            merged[name] = max(merged.get(name, rows), rows, key=lambda a: a.size)
        return merged or ()

    def init_shapes(self, shape: CacheShape) -> Any:
        """The tree of `init` without its arrays. Raises KvjaxError where a spec does not fit the shape."""
        return jax.eval_shape(lambda: self.init(shape))

    def logical_axes(self, shape: CacheShape) -> Any:
        """The tree of `init(shape).layers`, leaves PartitionSpecs of logical axis names."""
        return tuple(spec.logical_axes(each) for spec, each in self.each(shape))

    def shardings(self, shape: CacheShape, mesh: Mesh, replicate: tuple[str, ...] = ()) -> Any:
        """The tree of `init(shape).layers`, leaves NamedShardings; `replicate` names logical axes kept whole.

        Raises:
          KvjaxError: the mesh does not divide an axis.
        """
        return Layout(mesh, replicate).shardings(self.logical_axes(shape), self.init_shapes(shape).layers)

    # ---- what its specs promise

    @property
    def stream_chunk(self) -> int:
        """Tokens per streaming chunk: the largest that every layer allows."""
        chunks = [spec.largest_chunk for spec in self.specs]
        return math.gcd(*(chunk for chunk in chunks if chunk is not None)) or DEFAULT_STREAM

    def require_whole_windows(self, what: str) -> None:
        """Raises KvjaxError where a spec does not allow whole windows to be read in one pass, which `what` needs."""
        for i, spec in enumerate(self.specs):
            if not spec.whole_windows:
                raise KvjaxError(
                    f"layer {i} is {spec}, whose reads depend on how tokens are fed; {what} reads whole windows:"
                    " expected a method that allows it, or protocol streaming"
                )

    @property
    def simulated(self) -> bool:
        """Whether bits of a layer are claimed and not allocated."""
        return any(spec.simulated for spec in self.specs)

    @property
    def calibrated(self) -> bool:
        """Whether the method of a layer learns from a calibration text."""
        return any(spec.calibrated for spec in self.specs)

    # ---- figures

    @property
    def bits_nominal(self) -> float:
        """Mean code bits of K and V over the layers (KVTuner's f_m)."""
        return self._mean(lambda spec: spec.bits_nominal)

    @property
    def bits_asymptotic(self) -> float:
        """Mean bits per element, scales and zero points included, at long context."""
        return self._mean(lambda spec: spec.bits_asymptotic(self.model))

    def bits_real(self, context: int, batch: int = 1) -> float:
        """Bytes per element of `context` tokens in bits, what is unquantised counted as 16 bits."""
        return 8 * self.counted_bytes(context, batch) / self._elements(context, batch)

    def bits_peak(self, context: int, batch: int = 1) -> float:
        """`bits_real`, and what a decode step holds beside the cache, in bits per element of `context` tokens.

        That is the carry across layers (XQuant-CL's accumulator) at 16 bits a value. Weights, activations of the new
        token and attention's tiles are not counted: they do not grow with the context.
        """
        carry = jax.eval_shape(lambda: self.init_carry(self.shape(batch, context, REAL_DTYPE)))
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
        return self.bits_real(context, batch) + 8 * nbytes / self._elements(context, batch)

    def nbytes(self, context: int, batch: int = 1, dtype: Any = REAL_DTYPE) -> int:
        """Allocated bytes of all layers for `batch` sequences of `context` tokens, `dtype` what is unquantised."""
        shape = self.shape(batch, context, dtype)
        return self._sum(shape, lambda spec, shape: spec.nbytes(shape))

    def part_nbytes(self, shape: CacheShape, mesh: Mesh | AbstractMesh, replicate: tuple[str, ...] = ()) -> int:
        """Allocated bytes of all layers that each device of a mesh holds; `replicate` names logical axes kept whole.

        Raises:
          KvjaxError: the mesh does not divide an axis.
        """

        def of(spec: CacheSpec, shape: CacheShape) -> int:
            arrays = jax.eval_shape(lambda: spec.init(shape))
            return part_nbytes(mesh, spec.logical_axes(shape), arrays, replicate)

        return self._sum(shape, of)

    def counted_bytes(self, context: int, batch: int = 1) -> float:
        """`nbytes`, with the claimed bytes of simulated layers."""
        shape = self.shape(batch, context, REAL_DTYPE)
        return self._sum(shape, lambda spec, shape: spec.counted_bytes(shape))

    def compression(self, context: int, batch: int = 1) -> float:
        """How many times smaller than a 16-bit KV cache of `context` tokens it is."""
        return 16 / self.bits_real(context, batch)

    def coded_share(self, length: int) -> float:
        """Which share of `length` tokens the next one reads from codes, over all layers; the rest is held exactly."""
        return self._mean(lambda spec: spec.coded_tokens(length)) / max(length, 1)

    def table(self, context: int = TABLE_CONTEXT, batch: int = 1, dtype: Any = REAL_DTYPE) -> str:
        """Method, bits and bytes of each run of layers, for `batch` sequences of `context` tokens.

        Where some layers have a sliding window and others have none, also the bytes of both kinds.
        """
        shape = self.shape(batch, context, dtype)
        rows: list[tuple[str, ...]] = [("layers", "cache", "bits", "with scales", "bytes a layer")]
        for (spec, window), layers in self._layers().items():
            nbytes = spec.nbytes(dataclasses.replace(shape, window=window))
            figures = f"{spec.bits_nominal:.2f}", f"{spec.bits_asymptotic(self.model):.2f}", f"{nbytes:,}"
            rows.append((format_layers(layers), str(spec), *figures))
        kinds = [f"{kind} layers {nbytes:,}" for kind, nbytes in self.kind_nbytes(context, batch, dtype).items()]
        each = f" ({', '.join(kinds)})" if len(kinds) > 1 else ""
        total = (
            f"{batch} x {context} tokens: {self.nbytes(context, batch, dtype):,} bytes in {jnp.dtype(dtype)}{each},"
            f" {self.bits_real(context, batch):.2f} real bits per element,"
            f" {format_ratio(self.compression(context, batch), 1)} than 16-bit keys and values"
        )
        return f"{align_columns(rows, left=2)}\n{total}"

    def kind_nbytes(self, context: int, batch: int = 1, dtype: Any = REAL_DTYPE) -> dict[str, int]:
        """`nbytes` of each kind of layer that the model has, in the names of plans: sliding, full."""
        shape = self.shape(batch, context, dtype)

        def of(kind: list[int]) -> int:
            alike = ((*key, layers) for key, layers in self._layers().items() if layers[0] in kind)
            return sum(len(at) * spec.nbytes(dataclasses.replace(shape, window=window)) for spec, window, at in alike)

        return {name: of(layers) for name, layers in self.model.kinds.items() if layers}

    def _elements(self, context: int, batch: int) -> int:
        """Elements of K and V of all layers."""
        return batch * context * 2 * self.model.kv_heads * self.model.head_dim * self.model.layers

    def _layers(self) -> dict[tuple[CacheSpec, int | None], list[int]]:
        """The layers of each spec and sliding window, in order of appearance."""
        where: dict[tuple[CacheSpec, int | None], list[int]] = {}
        for i, spec in enumerate(self.specs):
            where.setdefault((spec, self.model.window(i)), []).append(i)
        return where

    def each(self, shape: CacheShape) -> list[tuple[CacheSpec, CacheShape]]:
        """The spec of every layer, and the shape with the layer's sliding window."""
        windows = map(self.model.window, range(len(self.specs)))
        shapes = (dataclasses.replace(shape, window=window) for window in windows)
        return list(zip(self.specs, shapes, strict=True))

    def _sum(self, shape: CacheShape, figure: Callable[[CacheSpec, CacheShape], Any]) -> Any:
        """A figure of all layers, computed once for those that are alike."""
        alike = self._layers().items()
        return sum(len(at) * figure(spec, dataclasses.replace(shape, window=window)) for (spec, window), at in alike)

    def _mean(self, figure: Callable[[CacheSpec], float]) -> float:
        return sum(len(layers) * figure(spec) for (spec, _), layers in self._layers().items()) / len(self.specs)


@struct.dataclass
class Cache:
    """What a model holds for a batch of sequences."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]  # tokens stored per sequence
    plan: CachePlan = struct.field(pytree_node=False)
    shape: CacheShape = struct.field(pytree_node=False)

    def axes(self) -> Any:
        """The same tree, leaves PartitionSpecs of logical axis names."""
        return dataclasses.replace(self, layers=self.plan.logical_axes(self.shape), length=BATCH)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<Cache {self.plan}: room for {self.shape.batch} x {self.shape.max_len} tokens>"

    def __str__(self) -> str:
        held, (batch, room) = [int(n) for n in self.length], (self.shape.batch, self.shape.max_len)
        fill = f"{' + '.join(map(str, held))} tokens held, room for {batch} x {room} ({sum(held) / batch / room:.0%})"
        return f"{fill}\n{self.plan.table(room, batch, self.shape.dtype)}"
