"""The contract of a cache.

A `CacheSpec` is the method and its settings for one layer: frozen, hashable, static under jit. It makes a
`LayerCache`, a pytree with one verb: `attend` takes the `Chunk` of tokens that arrived, attends, stores and
flushes in the order that suits the method.

What a query reads must not depend on how its tokens were fed, unless the spec says what it allows:

  * `largest_chunk`: feeding aligned chunks of so many tokens gives what feeding token by token gives. 1 unless the
    spec promises more; `streaming` scores in chunks that all layers allow.
  * `whole_windows`: how a query at position p reads each token (exactly, as stored, or not at all) follows from p and
    `residual_length` alone, so that one pass over a window gives what decoding gives. `parallel` scores and the
    tuner's simulation refuse a spec that does not promise it.

The contract suite (`python -m kvjax.testing`) holds every method to what it promises.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches import fields
from kvjax.caches.statistics import Statistics
from kvjax.errors import KvjaxError
from kvjax.ops.norm import normalize

REAL_DTYPE = jnp.bfloat16  # what an unquantised element counts as in every figure of bits
EXACT_BITS = 8 * jnp.dtype(REAL_DTYPE).itemsize


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
    @property
    def windows(self) -> tuple[int | None, ...]: ...


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that plans depend on; hashable.

    windows: the sliding window of each layer in tokens, None where a layer sees every token; () where all do.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    model_dim: int
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, model: ModelShapes) -> ModelSizes:
        """The sizes of a model config. Raises KvjaxError for what is none."""
        try:
            return cls(model.layers, model.heads, model.kv_heads, model.head_dim, model.model_dim, model.windows)
        except AttributeError:
            raise KvjaxError(f"the model is of type {type(model).__name__}; expected a model's config") from None

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees every token."""
        return self.windows[layer] if self.windows else None

    @property
    def kinds(self) -> dict[str, list[int]]:
        """The layers with a sliding window and those without, by the names that plans have for them."""
        kinds: dict[str, list[int]] = {"sliding": [], "full": []}
        for layer in range(self.layers):
            kinds["full" if self.window(layer) is None else "sliding"].append(layer)
        return kinds


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Sizes of one layer's cache.

    `max_len` in tokens per sequence; `dtype` of what is stored unquantised; `parts`: among how many devices a mesh
    divides the tokens of a sequence; `window`: how many tokens the layer's queries see, None where they see all. A
    method may forget what they no longer see.
    """

    batch: int
    max_len: int
    heads: int
    kv_heads: int
    head_dim: int
    model_dim: int
    dtype: Any = jnp.float32
    parts: int = 1
    window: int | None = None

    @classmethod
    def of(cls, config: LayerShapes, batch: int, max_len: int, dtype: Any, parts: int = 1) -> CacheShape:
        """The shape for a model config (anything with heads, kv_heads, head_dim, model_dim)."""
        return cls(batch, max_len, config.heads, config.kv_heads, config.head_dim, config.model_dim, dtype, parts)

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
    k_norm: Float[Array, "n"] | None = None  # of n channels that are normalised together: d of a head, or all Kd
    norm_eps: float = struct.field(pytree_node=False, default=1e-6)
    head_dim: int = struct.field(pytree_node=False, default=0)
    pre_norm: bool = struct.field(pytree_node=False, default=True)  # whether layer inputs are normalised

    def normalize(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """x / rms(x), with the layer's epsilon; x itself where the layer has no norm before attention."""
        return normalize(x, self.norm_eps) if self.pre_norm else x


@struct.dataclass
class Chunk:
    """What a layer knows when T tokens arrive. A method takes what it needs; XLA removes the rest."""

    h: Float[Array, "B T D"]  # layer input
    x: Float[Array, "B T D"]  # normalised; h itself where there is no norm before attention
    norm: Float[Array, "D"]  # the norm's weight; ones where there is none
    q: Float[Array, "B T H d"]  # after RoPE
    k: Float[Array, "B T K d"]  # after bias and qk-norm, before RoPE
    v: Float[Array, "B T K d"]
    positions: Int[Array, "B T"]  # consecutive; the first is the number of tokens stored before
    lengths: Int[Array, "B"]  # how many of the T are real
    weights: KVWeights
    bases: Any
    rope: Rotates
    rotation: tuple[Float[Array, "B T d"], Float[Array, "B T d"]]  # its cos and sin at `positions`
    window: int | None = struct.field(pytree_node=False)
    read: str = struct.field(pytree_node=False)  # "exact" or "stored"
    learned_sinks: Float[Array, "H"] | None = None  # a score of each head that joins its softmax and adds no value


class Attends(Protocol):
    """What a decoder layer asks of its cache."""

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], Any, Any]: ...


@struct.dataclass
class LayerCache(abc.ABC):
    """One layer's cache, a pytree."""

    @abc.abstractmethod
    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], LayerCache, Any]:
        """Attends, stores and flushes.

        Returns:
          The output, the cache with the chunk in it, and the carry for the next layer.
        """

    @abc.abstractmethod
    def materialize(
        self, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B N K d"], Float[Array, "B N K d"], Int[Array, "B N"], LayerCache, Any]:
        """The same store and flush as `attend`, slow and plain.

        Returns:
          Keys (after RoPE), values and their positions, -1 where absent: softmax attention over those that are
          `visible` gives `attend`'s output. Allocated tokens come first, in order. Then the cache and the carry.
        """


class CacheSpec(abc.ABC):
    """A method and its settings for one layer. Subclasses are frozen dataclasses.

    Attributes:
      form: the method's name in the plan grammar; {field} stands for the value of a field, as in `k{key_bits}`.
      modes: the values of the field `mode`; () where the method has none.
      aliases: more names, in the same form, with the fields that they set.
      examples: plans that the contract suite runs.
      simulated: whether the bits are claimed and not allocated.
    """

    form: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    examples: ClassVar[tuple[str, ...]] = ()
    simulated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises KvjaxError for a value that its field's type does not allow, and for a number below 0."""
        fields.check(self)

    @classmethod
    def parse(cls, name: str, mode: str | None, settings: Mapping[str, str]) -> CacheSpec | None:
        """The spec of a name, its @mode and its (field=value,...); None where the name is another method's.

        Raises:
          KvjaxError: a mode, field or value that the method does not have.
        """
        return fields.parse(cls, name, mode, settings)

    def __str__(self) -> str:
        """Canonical name: parses back to this spec."""
        return fields.to_text(self)

    @property
    def short_text(self) -> str:
        """The name with the fewest fields that parses back to this spec."""
        return fields.short_text(self)

    # ---- what the method promises, see the module's first lines

    @property
    def largest_chunk(self) -> int | None:
        """Tokens of the largest chunks that decoding may be replaced by; None: of any size."""
        return 1

    @property
    def whole_windows(self) -> bool:
        """Whether one pass over a whole window reads what decoding reads."""
        return False

    @property
    def residual_length(self) -> int:
        """R: tokens that are stored together, exact until then; 0 where every token is stored as it comes."""
        return 0

    def coded_tokens(self, length: int) -> int:
        """Of `length` tokens that are held, how many the next one reads from codes; the others are exact."""
        return 0 if self.bits_nominal == EXACT_BITS else length

    # ---- what it stores

    def resolve(self, model: LayerShapes) -> CacheSpec:
        """This spec with the defaults that follow the model filled in.

        Raises:
          KvjaxError: it does not fit the model.
        """
        return self

    @abc.abstractmethod
    def init(self, shape: CacheShape) -> LayerCache:
        """An empty cache.

        Raises:
          KvjaxError: the settings do not fit the shape.
        """

    def logical_axes(self, shape: CacheShape) -> Any:
        """The tree of `init`, every leaf a PartitionSpec of logical axis names: here, batch first and no more."""
        tree = jax.eval_shape(lambda: self.init(shape))
        return jax.tree.map(lambda leaf: PartitionSpec("batch", *(None,) * (leaf.ndim - 1)), tree)

    @property
    @abc.abstractmethod
    def bits_nominal(self) -> float:
        """KVTuner's figure: the mean of key and value code bits."""

    @abc.abstractmethod
    def bits_asymptotic(self, shape: LayerShapes) -> float:
        """Bits per element of K and V at long context: codes and scales, no residual."""

    def nbytes(self, shape: CacheShape) -> int:
        """Allocated bytes of one layer."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda: self.init(shape)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def counted_bytes(self, shape: CacheShape) -> float:
        """The bytes that figures state: the allocated ones, or those that a simulated method stands for."""
        return self.nbytes(shape)

    # ---- what it computes once per model, and what the tuner may vary without compiling

    @property
    def bases_key(self) -> str:
        """A name for what `bases` computes, the same for specs that share it; "" where there is nothing."""
        return ""

    @property
    def calibrated(self) -> bool:
        """Whether `bases` learns from a calibration text."""
        return False

    @property
    def trained(self) -> bool:
        """Whether `kvjax.learn` trains what `bases` begins with, on the calibration text."""
        return False

    def bases(self, weights: KVWeights, norm: Array, statistics: Statistics | None = None) -> Any:
        """What is computed once per model, from a layer's K/V weights and the weight of the norm before them.

        Args:
          weights: the K/V weights.
          norm: the weight of the norm.
          statistics: of the calibration text where the spec is `calibrated`, else None.

        Returns:
          Nested lists of numpy arrays in float64.
        """
        return []

    @property
    def program_form(self) -> CacheSpec:
        """The spec that stands for all specs which one program serves, their code widths being data: itself here."""
        return self


def visible(chunk: Chunk, positions: Int[Array, "B N"]) -> Bool[Array, "B T N"]:
    """Which keys, at `positions` (-1 where absent), each query of the chunk sees."""
    at, seen = chunk.positions[:, :, None], positions[:, None, :]
    mask = (seen >= 0) & (seen <= at)
    return mask if chunk.window is None else mask & (seen > at - chunk.window)
