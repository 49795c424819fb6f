"""The decoder of all families in one Flax module, used functionally.

Parameters (weights as in the checkpoints, [out, in]):

    embed [V, D]   norm [D]   head [V, D] (absent where tied)
    layer_i: q [H*d, D]  k, v [K*d, D]  o [D, H*d]  gate, up [F, D]  down [D, F]
    and where the config has them:
             attention_norm, mlp_norm [D] (before)  attention_post_norm, mlp_post_norm [D] (after)
             q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias
             q_norm, k_norm [d] of each head, or [H*d], [K*d] over all
             sinks [H]
    instead of gate, up and down, for E experts, all with biases or none:
             router [E, D]  expert_gate, expert_up [E, F, D]  expert_down [E, D, F]

V vocabulary, D model_dim, H heads, K kv_heads, d head_dim, F mlp_dim, B batch, T tokens of this call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Attends, Chunk, KVWeights
from kvjax.caches.plan import Cache
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.params import layer_shapes
from kvjax.models.rope import Rope, make_rope
from kvjax.ops.experts import Experts, Gated, mix, route
from kvjax.ops.norm import normalize
from kvjax.ops.rotate import rotate_heads

Weights = dict[str, Array]  # of a layer, by name
# What attention takes; `finish` takes the rest.
BEFORE = ("attention_norm", *("q", "k", "v"), *("q_bias", "k_bias", "v_bias"), *("q_norm", "k_norm", "sinks"))
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


def normed(weights: Weights, name: str, x: Float[Array, "... n"], eps: float) -> Float[Array, "... n"]:
    """`rms_norm` with the weight of that name, x itself where there is none."""
    return rms_norm(x, weights[name], eps) if name in weights else x


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """x times a number of the config, most often 1."""
    return x if factor == 1 else x * factor


def embed(config: ModelConfig, table: Float[Array, "V D"], tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The input of the first layer.

    Args:
      config: the decoder's config.
      table: the embedding.
      tokens: token ids.
    """
    return scaled(table[tokens], config.embedding_scale)


def final_states(config: ModelConfig, norm: Float[Array, "D"], h: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Final hidden states: what the head makes logits of.

    Args:
      config: the decoder's config.
      norm: the weight of the last norm.
      h: the output of the last layer.
    """
    return scaled(rms_norm(h, norm, config.norm_eps), config.logit_scale)


def _clamped_silu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """gpt-oss: values are clamped, the sigmoid is steeper, and 1 is added to the other factor."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


GATED: dict[str, Gated] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate) * up,
    "clamped_silu": _clamped_silu,
}


def mlp(config: ModelConfig, weights: Weights, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The gated MLP of a layer: one for all tokens, or the sum of each token's experts."""
    gated = GATED[config.activation]
    if not config.experts:
        gate, up = (project(weights, name, x) for name in ("gate", "up"))
        return project(weights, "down", gated(gate, up))
    tokens = x.reshape(-1, x.shape[-1])
    chosen, share = route(project(weights, "router", tokens), config.experts_per_token, config.normalized_experts)
    own: Any = {name: weights.get(f"expert_{name}") for name in Experts._fields}
    return mix(tokens, Experts(**own), chosen, share, gated).reshape(x.shape)


def finish(
    config: ModelConfig, weights: Weights, h: Float[Array, "B T D"], attended: Float[Array, "B T q"]
) -> Float[Array, "B T D"]:
    """What a layer does after attention, to every token alone: the output projection, the MLP, the residual sums.

    Args:
      config: the decoder's config.
      weights: the layer's, from `o` on.
      h: the layer's input.
      attended: the attention's output, all heads side by side.
    """
    eps, share = config.norm_eps, config.residual_scale
    h = h + scaled(normed(weights, "attention_post_norm", project(weights, "o", attended), eps), share)
    y = mlp(config, weights, normed(weights, "mlp_norm", h, eps))
    return h + scaled(normed(weights, "mlp_post_norm", y, eps), share)


def finish_by_tiles(
    config: ModelConfig, weights: Weights, h: Float[Array, "B T D"], attended: Float[Array, "B T q"]
) -> Float[Array, "B T D"]:
    """`finish` of `TOKEN_TILE` tokens at a time where there are more, so that no array [T, F] is held."""
    tokens = h.shape[1]
    if tokens <= TOKEN_TILE:
        return finish(config, weights, h, attended)
    h, attended = (jnp.pad(a, ((0, 0), (0, -tokens % TOKEN_TILE), (0, 0))) for a in (h, attended))

    def step(i: Array, h: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        tiles = [jax.lax.dynamic_slice_in_dim(a, i * TOKEN_TILE, TOKEN_TILE, 1) for a in (h, attended)]
        # XLA's CPU backend widens bfloat16 weights; without a barrier it would keep those of all layers widened.
        (below, seen), kept = jax.lax.optimization_barrier((tiles, weights))
        return jax.lax.dynamic_update_slice_in_dim(h, finish(config, kept, below, seen), i * TOKEN_TILE, 1)

    return jax.lax.fori_loop(0, h.shape[1] // TOKEN_TILE, step, h)[:, :tokens]


class Layer(nn.Module):
    """One transformer layer; its cache is an argument and a result."""

    config: ModelConfig
    window: int | None
    rope: RopeConfig

    def _weights(self) -> Weights:
        def init(name: str) -> Any:
            return nn.initializers.ones if name.endswith("norm") else nn.initializers.normal(0.02)

        return {name: self.param(name, init(name), shape) for name, shape in layer_shapes(self.config).items()}

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
        c, w = self.config, self._weights()
        batch, tokens, dim = h.shape
        x, norm = normed(w, "attention_norm", h, c.norm_eps), w.get("attention_norm", jnp.ones(dim, h.dtype))
        q = project(w, "q", x)
        if c.qk_norm:
            q = norm_parts(q, w["q_norm"], c.norm_eps)
        q = scaled(q, c.query_scale).reshape(batch, tokens, c.heads, c.head_dim)
        weights = kv_weights(c, w)
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
            learned_sinks=w.get("sinks"),
        )
        attended, cache, carry = cache.attend(chunk, carry)
        rest = {name: each for name, each in w.items() if name not in BEFORE}
        return finish_by_tiles(c, rest, h, attended.reshape(batch, tokens, -1)), cache, carry


def kv_weights(config: ModelConfig, weights: Weights) -> KVWeights:
    """Those of a layer's weights that turn its normalised input into keys and values."""
    own: Any = {name: weights.get(name) for name in ("k", "v", "k_bias", "v_bias", "k_norm")}
    return KVWeights(**own, norm_eps=config.norm_eps, head_dim=config.head_dim, pre_norm=config.pre_norm)


def norm_parts(x: Float[Array, "... m"], weight: Float[Array, "n"], eps: float) -> Float[Array, "... m"]:
    """`rms_norm` of each n channels: of every head, or of all heads together."""
    return rms_norm(x.reshape(*x.shape[:-1], -1, len(weight)), weight, eps).reshape(x.shape)


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
    if weights.k_norm is not None:
        k = norm_parts(k, weights.k_norm, weights.norm_eps)
    k, v = (a.reshape(batch, tokens, kv_heads, -1) for a in (k, v))
    return k, v


def layer_of(config: ModelConfig, layer: int) -> Layer:
    """The module of one layer. Layers of one kind are equal, and so share programs."""
    return Layer(config, config.layer_window(layer), config.layer_rope(layer))


def first_alike(config: ModelConfig, layer: int) -> int:
    """The first layer that differs from this one only in weights, so that the two share a program."""
    own = layer_of(config, layer)
    return next(i for i in range(layer + 1) if layer_of(config, i) == own)


def run_layer(
    config: ModelConfig,
    layer: int,
    params: Weights,
    h: Float[Array, "B T D"],
    bases: Any,
    cache: Attends,
    carry: Any,
    *,
    stored: Int[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    max_len: int | None = None,
    read: str = "exact",
) -> tuple[Float[Array, "B T D"], Any, Any]:
    """Runs one layer alone; a whole window where only its input is given.

    Args:
      config: config of the model.
      layer: index of the layer.
      params: parameters of the layer.
      h: input of the layer, for T tokens.
      bases: what the layer's spec computed once per model.
      cache: the layer's cache.
      carry: what runs across the layers.
      stored: tokens of each sequence that the cache holds; 0 where None.
      lengths: real tokens per sequence; all T where None.
      max_len: tokens that a sequence has room for; T where None.
      read: as in `Decoder.__call__`.

    Returns:
      The output, the cache with the tokens in it, and the carry for the next layer.
    """
    batch, count = h.shape[:2]
    positions = jnp.arange(count, dtype=jnp.int32)[None]
    if stored is not None:
        positions = stored[:, None] + positions
    module: Any = layer_of(config, layer)
    rope = make_rope(module.rope, config.head_dim, count if max_len is None else max_len)
    lengths = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
    rotation = rope.table(positions, h.dtype)
    return module.apply({"params": params}, h, positions, lengths, rope, rotation, bases, cache, carry, read)


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
        h = embed(c, self.embed, tokens)
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
        return final_states(c, self.norm, h), dataclasses.replace(
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
