"""Methods whose layers depend on one another, stacked from the first layer up."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from kvjax.caches.base import CacheShape, CacheSpec
from kvjax.errors import KvjaxError

Spec = TypeVar("Spec", bound=CacheSpec)


class CrossLayerSpec(CacheSpec):
    """A spec that knows its place among the layers. Layers with a carry hand it on within each step."""

    @abc.abstractmethod
    def with_index(self, below: CacheSpec | None) -> CrossLayerSpec:
        """This spec on top of the layer below, None for the first layer."""

    @abc.abstractmethod
    def validate_above(self, above: CacheSpec | None) -> None:
        """Raises KvjaxError where the method cannot end under the layer above (None: this is the last layer)."""

    @property
    @abc.abstractmethod
    def canonical(self) -> CrossLayerSpec:
        """What this spec stores, wherever it stands: the same for specs that store the same."""

    @property
    @abc.abstractmethod
    def delta(self) -> bool:
        """Whether it stores a difference from what the layer below leaves: its error then depends on that layer's."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """A name of `canonical` that tells apart what one plan name stores at different layers."""

    @property
    @abc.abstractmethod
    def run_key(self) -> Any:
        """All of this spec that the layer above depends on, hashable."""

    @abc.abstractmethod
    def init_carry(self, shape: CacheShape) -> dict[str, Any]:
        """What runs across the layers within one step, by name; other methods' names pass through."""


def stack(spec: Spec, below: CacheSpec | None) -> Spec:
    """The spec on top of the layer below (None: the first layer)."""
    return spec.with_index(below) if isinstance(spec, CrossLayerSpec) else spec  # type: ignore[return-value]


def validate_top(spec: CacheSpec, above: CacheSpec | None) -> None:
    """Raises KvjaxError where the spec cannot end under the layer above (None: it is the last layer)."""
    if isinstance(spec, CrossLayerSpec):
        spec.validate_above(above)


def fits_under(spec: CacheSpec, above: CacheSpec | None) -> bool:
    """Whether `validate_top` accepts the layer above."""
    try:
        validate_top(spec, above)
    except KvjaxError:
        return False
    return True


class Place(NamedTuple):
    """What the error of a layer depends on, beside the layer.

    Attributes:
      spec: what the layer stores, wherever it stands.
      below: likewise the layer below where this one stores a difference from that, else None.
    """

    spec: CacheSpec
    below: CacheSpec | None = None

    @classmethod
    @functools.lru_cache(maxsize=2**12)
    def of(cls, spec: CacheSpec, below: CacheSpec | None) -> Place:
        """The place of a spec that is stacked on the one below (None: the first layer)."""
        relative = isinstance(spec, CrossLayerSpec) and spec.delta and below is not None
        return cls(_canonical(spec), _canonical(below) if relative and below else None)

    @property
    def label(self) -> str:
        """A name that no other place has."""
        return _label(self.spec) + (f", on {_label(self.below)}" if self.below else "")


def _canonical(spec: CacheSpec) -> CacheSpec:
    return spec.canonical if isinstance(spec, CrossLayerSpec) else spec


def _label(spec: CacheSpec) -> str:
    return spec.label if isinstance(spec, CrossLayerSpec) else str(spec)


def run_key(spec: CacheSpec) -> Any:
    """All of the spec that the layer above depends on, hashable; None where it depends on nothing."""
    return spec.run_key if isinstance(spec, CrossLayerSpec) else None


def init_carries(specs: Sequence[CacheSpec], shape: CacheShape) -> list[dict[str, Any]]:
    """The carries of the specs that hand one on."""
    return [spec.init_carry(shape) for spec in specs if isinstance(spec, CrossLayerSpec)]
