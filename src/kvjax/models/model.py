"""The model that is loaded, used and saved."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kvjax.caches.base import CacheShape
from kvjax.errors import KvjaxError
from kvjax.mesh import ONE_DEVICE, Layout, describe
from kvjax.models.calibration import Calibration
from kvjax.models.config import ModelConfig
from kvjax.models.params import Params
from kvjax.models.tokenizer import AnyTokenizer
from kvjax.models.units import in_usual_units


@dataclasses.dataclass(repr=False)
class Model:
    """A decoder's config and weights, with its tokenizer.

    Weights whose keys, values or layer inputs float16 scales would not hold are kept in other units, see
    `kvjax.models.units`: the same function.
    """

    name: str  # as given; ends in (layers=N) where only the first N layers were kept
    config: ModelConfig
    params: Params
    tokenizer: AnyTokenizer
    dtype: jnp.dtype  # of the parameters
    checksum: str  # sha256 of the source files, or of the name where the weights are random
    layout: Layout = ONE_DEVICE  # where the parameters live, and all that is computed with them
    calibration: Calibration | None = None  # what its methods learned from, see `kvjax.calibrated`

    @property
    def mesh(self) -> Mesh | None:
        """The devices; None where it is one."""
        return self.layout.mesh

    def __post_init__(self) -> None:
        if self.params is not None:
            self.params = in_usual_units(self.config, self.params)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The weight that gives the logits: the embedding where the two are tied."""
        return self.params["embed" if self.config.tied else "head"]

    def cache_shape(self, batch: int, max_len: int) -> CacheShape:
        """The sizes of each layer's cache for this model, where it lives."""
        return CacheShape.of(self.config, batch, max_len, self.dtype, self.layout.parts("tokens"))

    def __repr__(self) -> str:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))
        layers = f"{self.config.family}, {self.config.layers} layers"
        where = "" if self.mesh is None else f", on {describe(self.mesh)}"
        return f"<Model {self.name}: {layers}, {count:,} parameters, {self.dtype}{where}>"


def check_model(model: Any) -> None:
    """Raises KvjaxError for anything else than a Model."""
    if not isinstance(model, Model):
        raise KvjaxError(f"the model is of type {type(model).__name__}; expected what kvjax.load gives")
