"""The decoder of all families in one Flax module, used functionally.

Parameters (weights as in the checkpoints, [out, in]):

    embed [V, D]   norm [D]   head [V, D] (absent where tied)
    layer_i: attention_norm [D]  q [H*d, D]  k, v [K*d, D]  o [D, H*d]  mlp_norm [D]  gate, up [F, D]  down [D, F]
             q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias (where the config has them)
             q_norm, k_norm [d] (Qwen3)

V vocabulary, D model_dim, H heads, K kv_heads, d head_dim, F mlp_dim, B batch, T tokens of this call.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Attends, Chunk, KVWeights
from kvjax.caches.plan import Cache
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.rope import Rope, make_rope
from kvjax.ops.norm import normalize
from kvjax.ops.rotate import rotate_heads

Weights = dict[str, Array]  # of a layer, by name
TOKEN_TILE = 1024  # tokens that go through an MLP together


def rms_norm(x: Float[Array, "... n"], weight: Float[Array, "n"], eps: float) -> Float[Array, "... n"]:
    """Normalises x by its root mean square and scales it: x / rms(x) * weight.

    Args:
      x: values.
      weight: scale of each channel.
      eps: added to the mean of squares.
    """
    return normalize(x, eps) * weight


def linear(x: Float[Array, "... i"], weight: Float[Array, "o i"]) -> Float[Array, "... o"]:
    """Multiplies x by a weight stored as [out, in], as checkpoints have it.

    Args:
      x: values.
      weight: the weight.
    """
    return jnp.einsum("...i,oi->...o", x, weight)


def project(weights: Weights, name: str, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    """`linear` with the weight of that name, and its bias where there is one."""
    y, bias = linear(x, weights[name]), weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def finish(
    weights: Weights, h: Float[Array, "B T D"], attended: Float[Array, "B T q"], eps: float
) -> Float[Array, "B T D"]:
    """What a layer does after attention, to every token alone: the output projection, the MLP, the residual sums.

    Args:
      weights: the layer's, from `o` to `down`.
      h: the layer's input.
      attended: the attention's output, all heads side by side.
      eps: of the norm.
    """
    h = h + project(weights, "o", attended)
    x = rms_norm(h, weights["mlp_norm"], eps)
    gate, up = (project(weights, name, x) for name in ("gate", "up"))
    return h + project(weights, "down", jax.nn.silu(gate) * up)


def finish_by_tiles(
    weights: Weights, h: Float[Array, "B T D"], attended: Float[Array, "B T q"], eps: float
) -> Float[Array, "B T D"]:
    """`finish` of `TOKEN_TILE` tokens at a time where there are more, so that no array [T, F] is held."""
    tokens = h.shape[1]
    if tokens <= TOKEN_TILE:
        return finish(weights, h, attended, eps)
    h, attended = (jnp.pad(a, ((0, 0), (0, -tokens % TOKEN_TILE), (0, 0))) for a in (h, attended))

    def step(i: Array, h: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        tiles = [jax.lax.dynamic_slice_in_dim(a, i * TOKEN_TILE, TOKEN_TILE, 1) for a in (h, attended)]
        # XLA's CPU backend widens bfloat16 weights; without a barrier it would keep those of all layers widened.
        (below, seen), kept = jax.lax.optimization_barrier((tiles, weights))
        return jax.lax.dynamic_update_slice_in_dim(h, finish(kept, below, seen, eps), i * TOKEN_TILE, 1)

    return jax.lax.fori_loop(0, h.shape[1] // TOKEN_TILE, step, h)[:, :tokens]


class Layer(nn.Module):
    """One transformer layer; its cache is an argument and a result."""

    config: ModelConfig
    window: int | None
    rope: RopeConfig

    def _param(self, name: str, *shape: int) -> Array:
        init = nn.initializers.ones if name.endswith("norm") else nn.initializers.normal(0.02)
        return self.param(name, init, shape)

    def _projection(self, name: str, inputs: int, outputs: int, bias: bool) -> Weights:
        weights = {name: self._param(name, outputs, inputs)}
        return weights | {f"{name}_bias": self._param(f"{name}_bias", outputs)} if bias else weights

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        rope: Rope,
        rotation: tuple[Array, Array],
        bases,
        cache: Attends,
        carry,
        read: str,
    ):
        c = self.config
        batch, tokens, dim = h.shape
        q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim
        norm = self._param("attention_norm", dim)
        x = rms_norm(h, norm, c.norm_eps)
        q = linear(x, self._param("q", q_dim, dim))
        weights = KVWeights(
            k=self._param("k", kv_dim, dim), v=self._param("v", kv_dim, dim), norm_eps=c.norm_eps, head_dim=c.head_dim
        )
        if c.qkv_bias:
            q = q + self._param("q_bias", q_dim)
            weights = dataclasses.replace(
                weights, k_bias=self._param("k_bias", kv_dim), v_bias=self._param("v_bias", kv_dim)
            )
        q = q.reshape(batch, tokens, c.heads, c.head_dim)
        if c.qk_norm:
            q = rms_norm(q, self._param("q_norm", c.head_dim), c.norm_eps)
            weights = dataclasses.replace(weights, k_norm=self._param("k_norm", c.head_dim))
        k, v = project_kv(x, weights, c.kv_heads)
        chunk = Chunk(
            h=h,
            x=x,
            norm=norm,
            q=rotate_heads(q, rotation),
            k=k,
            v=v,
            positions=positions,
            lengths=lengths,
            weights=weights,
            bases=bases,
            rope=rope,
            rotation=rotation,
            window=self.window,
            read=read,
        )
        attended, cache, carry = cache.attend(chunk, carry)
        rest = {
            **self._projection("o", q_dim, dim, c.o_bias),
            "mlp_norm": self._param("mlp_norm", dim),
            **self._projection("gate", dim, c.mlp_dim, c.mlp_bias),
            **self._projection("up", dim, c.mlp_dim, c.mlp_bias),
            **self._projection("down", c.mlp_dim, dim, c.mlp_bias),
        }
        return finish_by_tiles(rest, h, attended.reshape(batch, tokens, q_dim), c.norm_eps), cache, carry


def project_kv(
    x: Float[Array, "B T D"], weights: KVWeights, kv_heads: int
) -> tuple[Float[Array, "B T K d"], Float[Array, "B T K d"]]:
    """Projects normalised layer inputs to keys and values.

    Args:
      x: layer inputs after the norm.
      weights: the layer's K and V weights, biases and qk-norm.
      kv_heads: K.

    Returns:
      Keys (after bias and qk-norm, before RoPE) and values.
    """
    batch, tokens, _ = x.shape
    k, v = linear(x, weights.k), linear(x, weights.v)
    if weights.k_bias is not None and weights.v_bias is not None:
        k, v = k + weights.k_bias, v + weights.v_bias
    k, v = (a.reshape(batch, tokens, kv_heads, -1) for a in (k, v))
    if weights.k_norm is not None:
        k = rms_norm(k, weights.k_norm, weights.norm_eps)
    return k, v


def layer_of(config: ModelConfig, layer: int) -> Layer:
    """The module of one layer. Layers of one kind are equal, and so share programs."""
    return Layer(config, config.layer_window(layer), config.layer_rope(layer))


class Decoder(nn.Module):
    """Tokens and a cache in, final hidden states and the cache out; `logits` is a separate step."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embed = self.param("embed", init, (c.vocab_size, c.model_dim))
        self.norm = self.param("norm", nn.initializers.ones, (c.model_dim,))
        if not c.tied:
            self.head = self.param("head", init, (c.vocab_size, c.model_dim))
        self.layer = [layer_of(c, i) for i in range(c.layers)]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        lengths: Int[Array, "B"] | None = None,
        read: str = "exact",
        bases: tuple | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Feeds T more tokens to every sequence.

        Args:
          tokens: token ids; of sequence b the first `lengths[b]` are real, the rest padding.
          cache: the sequences' cache so far, with `cache.length` tokens per sequence.
          lengths: real tokens per sequence; all T where None.
          read: "exact" (a query reads its own chunk and the residual exactly) or "stored"
            (it reads every token as stored, including its own).
          bases: what the plan's specs computed once per model, a pytree per layer; None where they need nothing.

        Returns:
          The normalised final hidden states (meaningless at padding) and the cache with the tokens stored.
        """
        c = self.config
        batch, count = tokens.shape
        lengths = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
        positions = cache.length[:, None] + jnp.arange(count, dtype=jnp.int32)
        h = self.embed[tokens]
        ropes = {layer.rope: make_rope(layer.rope, c.head_dim, cache.shape.max_len) for layer in self.layer}
        rotations = {kind: rope.table(positions, h.dtype) for kind, rope in ropes.items()}
        carry = cache.plan.init_carry(cache.shape)
        bases = ((),) * c.layers if bases is None else bases
        stored = []
        self.sow("hidden", "h", h)  # kept only where the caller asks for it, see models/nonfinite.py
        for layer, factor, layer_cache in zip(self.layer, bases, cache.layers, strict=True):
            rope, rotation = ropes[layer.rope], rotations[layer.rope]
            h, layer_cache, carry = layer(h, positions, lengths, rope, rotation, factor, layer_cache, carry, read)
            stored.append(layer_cache)
            self.sow("hidden", "h", h)
        return rms_norm(h, self.norm, c.norm_eps), dataclasses.replace(
            cache, layers=tuple(stored), length=cache.length + lengths
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Computes the logits.

        Args:
          hidden: final hidden states, as `__call__` returns them.

        Returns:
          Logits, accumulated in float32 or wider.
        """
        head = self.embed if self.config.tied else self.head
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=dtype)
