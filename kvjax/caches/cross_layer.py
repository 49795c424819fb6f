"""Methods whose layers depend on one another, stacked from the first layer up."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypeVar

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
    def label(self) -> str:
        """A name of `canonical` that tells apart what one plan name stores at different layers."""

    @property
    @abc.abstractmethod
    def run_key(self) -> Any:
        """All of this spec that the layer above depends on, hashable."""

    @property
    @abc.abstractmethod
    def exact(self) -> CrossLayerSpec:
        """The same method unquantised."""

    @abc.abstractmethod
    def init_carry(self, shape: CacheShape) -> Any:
        """What runs across the layers within one step."""


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


def canonical(spec: CacheSpec) -> CacheSpec:
    """What the spec stores, wherever it stands."""
    return spec.canonical if isinstance(spec, CrossLayerSpec) else spec


def label(spec: CacheSpec) -> str:
    """A name of what the spec stores, wherever it stands."""
    return spec.label if isinstance(spec, CrossLayerSpec) else str(spec)


def run_key(spec: CacheSpec) -> Any:
    """All of the spec that the layer above depends on, hashable; None where it depends on nothing."""
    return spec.run_key if isinstance(spec, CrossLayerSpec) else None


def init_carries(specs: Sequence[CacheSpec], shape: CacheShape) -> list[Any]:
    """The carries of the specs that hand one on."""
    return [spec.init_carry(shape) for spec in specs if isinstance(spec, CrossLayerSpec)]
