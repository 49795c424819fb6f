"""The contract of a cache.

A `CacheSpec` is the method and its settings for one layer: frozen, hashable, static under jit. It makes a
`LayerCache`, a pytree with one verb: `attend` takes the `Chunk` of tokens that arrived, attends, stores and
flushes in the order that suits the method. `Cache` is what a whole model holds.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax.errors import KvjaxError
from kvjax.ops.norm import normalize

REAL_DTYPE = jnp.bfloat16  # what an unquantised element counts as in every figure of bits


class LayerShapes(Protocol):
    """The sizes of a layer that caches depend on."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def model_dim(self) -> int: ...


class ModelShapes(LayerShapes, Protocol):
    """What a model config says of them."""

    @property
    def layers(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Sizes of one layer's cache. `max_len` in tokens per sequence; `dtype` of what is stored unquantised."""

    batch: int
    max_len: int
    heads: int
    kv_heads: int
    head_dim: int
    model_dim: int
    dtype: Any = jnp.float32

    @classmethod
    def of(cls, config: LayerShapes, batch: int, max_len: int, dtype: Any) -> CacheShape:
        """The shape for a model config (anything with heads, kv_heads, head_dim, model_dim)."""
        return cls(batch, max_len, config.heads, config.kv_heads, config.head_dim, config.model_dim, dtype)

    @property
    def elements_per_token(self) -> int:
        """Elements of K and V per token and layer: what bits are counted against."""
        return 2 * self.kv_heads * self.head_dim


class Rotates(Protocol):
    """A rope: gives cos and sin [..., head_dim] of any positions."""

    def table(self, positions: Array, dtype: Any) -> tuple[Array, Array]: ...


@struct.dataclass
class KVWeights:
    """What turns a normalised layer input into keys (before RoPE) and values. d head_dim, K kv heads."""

    k: Float[Array, "Kd D"]
    v: Float[Array, "Kd D"]
    k_bias: Float[Array, "Kd"] | None = None
    v_bias: Float[Array, "Kd"] | None = None
    k_norm: Float[Array, "d"] | None = None
    norm_eps: float = struct.field(pytree_node=False, default=1e-6)
    head_dim: int = struct.field(pytree_node=False, default=0)

    def normalize(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """x / rms(x), with the layer's epsilon."""
        return normalize(x, self.norm_eps)


@struct.dataclass
class Chunk:
    """What a layer knows when T tokens arrive. A method takes what it needs; XLA removes the rest."""

    h: Float[Array, "B T D"]  # layer input
    x: Float[Array, "B T D"]  # normalised
    norm: Float[Array, "D"]  # the norm's weight
    q: Float[Array, "B T H d"]  # after RoPE
    k: Float[Array, "B T K d"]  # after bias and qk-norm, before RoPE
    v: Float[Array, "B T K d"]
    positions: Int[Array, "B T"]  # consecutive; the first is the number of tokens stored before
    lengths: Int[Array, "B"]  # how many of the T are real
    weights: KVWeights
    factors: Any
    rope: Rotates
    rotation: tuple[Float[Array, "B T d"], Float[Array, "B T d"]]  # its cos and sin at `positions`
    window: int | None = struct.field(pytree_node=False)
    read: str = struct.field(pytree_node=False)  # "exact" or "stored"


@struct.dataclass
class LayerCache(abc.ABC):
    """One layer's cache, a pytree."""

    @abc.abstractmethod
    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], LayerCache, Any]:
        """Attends, stores and flushes; output, the cache with the chunk in it, and the carry for the next layer."""

    @abc.abstractmethod
    def materialize(
        self, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B N K d"], Float[Array, "B N K d"], Int[Array, "B N"], LayerCache, Any]:
        """The same store and flush, slow and plain: k (after RoPE), v and their positions, -1 where absent, over
        the `visible` of which softmax attention gives `attend`'s output. Allocated tokens come first, in order."""


class CacheSpec(abc.ABC):
    """A method and its settings for one layer. Subclasses are frozen dataclasses."""

    pattern: ClassVar[str]  # regular expression of the method's names in the plan grammar
    modes: ClassVar[tuple[str, ...]]  # the first is meant where none is named; () where there are none

    @classmethod
    @abc.abstractmethod
    def parse(cls, name: str, mode: str | None, fields: dict[str, Any]) -> CacheSpec:
        """The spec of a name that matches `pattern`."""

    def settle(self, model: LayerShapes) -> CacheSpec:
        """This spec with the defaults that follow the model filled in. Raises KvjaxError where it does not fit."""
        return self

    def placed(self, below: CacheSpec | None) -> CacheSpec:
        """This spec on top of the layer below, for methods whose layers depend on one another."""
        return self

    def each_width(self, change: Callable[[int], int]) -> CacheSpec:
        """This spec with `change` applied to its widths."""
        names = (field.name for field in dataclasses.fields(self) if field.name.endswith("bits"))  # type: ignore[arg-type]
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})  # type: ignore[type-var]

    @property
    def alone(self) -> CacheSpec:
        """What this spec stores, whatever its place among the layers: the same for specs that store the same."""
        return self

    @property
    def place(self) -> Any:
        """All of this spec that the layer above depends on, hashable; None where it depends on nothing."""
        return None

    def check_below(self, above: CacheSpec | None) -> None:  # noqa: B027, most methods need no look above
        """Raises KvjaxError where the method cannot end under the layer above (None: the last layer)."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """Canonical name: parses back to this spec."""

    @abc.abstractmethod
    def init(self, shape: CacheShape) -> LayerCache:
        """An empty cache. Raises KvjaxError where the settings do not fit the shape."""

    @abc.abstractmethod
    def logical_axes(self, shape: CacheShape) -> Any:
        """The tree of `init`, every leaf a PartitionSpec of logical axis names."""

    @property
    @abc.abstractmethod
    def bits_nominal(self) -> float:
        """KVTuner's figure: the mean of key and value code bits."""

    @abc.abstractmethod
    def bits_asymptotic(self, shape: CacheShape) -> float:
        """Bits per element of K and V at long context: codes and scales, no residual."""

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """The residual R in tokens, 0 where every token is stored as it comes."""

    @property
    def factors_key(self) -> str:
        """A name for what `factors` computes, the same for specs that share it; "" where there is nothing."""
        return ""

    def factors(self, weights: KVWeights, norm: Array) -> Any:
        """What is computed once per model, from a layer's K/V weights and the weight of the norm before them:
        nested lists of numpy arrays in float64."""
        return []

    def init_carry(self, shape: CacheShape) -> Any:
        """What runs across the layers within one step; () where the method threads nothing."""
        return ()

    def nbytes(self, shape: CacheShape) -> int:
        """Allocated bytes of one layer."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda: self.init(shape)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


@struct.dataclass
class Cache:
    """What a model holds for a batch of sequences."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]  # tokens stored per sequence
    plan: Any = struct.field(pytree_node=False)  # CachePlan
    shape: CacheShape = struct.field(pytree_node=False)

    def __str__(self) -> str:
        return self.plan.describe(self.shape, self.length)


def visible(chunk: Chunk, positions: Int[Array, "B N"]) -> Bool[Array, "B T N"]:
    """Which keys, at `positions` (-1 where absent), each query of the chunk sees."""
    at, seen = chunk.positions[:, :, None], positions[:, None, :]
    mask = (seen >= 0) & (seen <= at)
    return mask if chunk.window is None else mask & (seen > at - chunk.window)


def check_fields(name: str, fields: dict[str, Any], known: dict[str, type]) -> None:
    """Raises KvjaxError for a field that the method does not have or a value of the wrong kind."""
    for key, value in fields.items():
        if key not in known:
            raise KvjaxError(f"{name}: no field {key!r}; expected one of {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise KvjaxError(f"{name}: {key}={value!r}; expected {known[key].__name__}")
