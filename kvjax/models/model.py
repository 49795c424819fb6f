"""The model that is loaded, used and saved."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kvjax.mesh import ONE_DEVICE, Layout, describe
from kvjax.models.config import ModelConfig
from kvjax.models.params import Params
from kvjax.models.tokenizer import AnyTokenizer


@dataclasses.dataclass(repr=False)
class Model:
    """A decoder's config and weights, with its tokenizer."""

    name: str  # as given; ends in (layers=N) where only the first N layers were kept
    config: ModelConfig
    params: Params
    tokenizer: AnyTokenizer
    dtype: jnp.dtype  # of the parameters
    checksum: str  # sha256 of the source files, or of the name where the weights are random
    layout: Layout = ONE_DEVICE  # where the parameters live, and all that is computed with them

    @property
    def mesh(self) -> Mesh | None:
        """The devices; None where it is one."""
        return self.layout.mesh

    @property
    def head(self) -> Float[Array, "V D"]:
        """The weight that gives the logits: the embedding where the two are tied."""
        return self.params["embed" if self.config.tied else "head"]

    def __repr__(self) -> str:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))
        layers = f"{self.config.family}, {self.config.layers} layers"
        where = "" if self.mesh is None else f", on {describe(self.mesh)}"
        return f"<Model {self.name}: {layers}, {count:,} parameters, {self.dtype}{where}>"
