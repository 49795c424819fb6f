"""What is compiled: a step that reads prompts, and a loop of decode steps over one state, its cache updated in place.

B sequences of a batch, T tokens fed at once, D model_dim, V vocabulary, N room for new tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.plan import Cache
from kvjax.generation.sampling import Sampling, sample
from kvjax.generation.states import Held
from kvjax.mesh import BATCH
from kvjax.models.decoder import Decoder
from kvjax.models.params import Params


def bucket(tokens: int) -> int:
    """The size that is compiled for so many tokens: at most a quarter more (or 15), so that programs are few."""
    step = max(16, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def pad(ids: Sequence[Int[np.ndarray, "n"]], size: int | None = None) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Token ids of any lengths side by side, T the size, or else their bucket; and how many of the T are real."""
    lengths = np.array([len(each) for each in ids], np.int32)
    tokens = np.zeros((len(ids), size or bucket(int(lengths.max()))), np.int32)
    for row, each in zip(tokens, ids, strict=True):
        row[: len(each)] = each
    return jnp.asarray(tokens), jnp.asarray(lengths)


def pad_stop(tokens: Sequence[int]) -> Int[Array, "s"]:
    """Stop tokens, then -1, which is no token: programs do not depend on how many there are."""
    return jnp.asarray([*tokens] + [-1] * (bucket(len(tokens) + 1) - len(tokens)), jnp.int32)


# ---- prefill


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="held")
def feed(
    decoder: Decoder, params: Params, bases: Any, held: Held, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Held:
    """Reads `lengths` of the tokens into each sequence in one step. Donates `held`: its buffers are written into."""
    apply: Any = decoder.apply
    hidden, cache = apply({"params": params}, tokens, held.cache, lengths, bases=bases)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], 1)[:, 0]
    return held.then(cache, jnp.where(lengths[:, None] > 0, last, held.hidden))


@functools.partial(jax.jit, static_argnames=("decoder", "read"))
def hidden_states(
    decoder: Decoder,
    params: Params,
    bases: Any,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    read: str,
) -> Float[Array, "B T D"]:
    """Final hidden states of the tokens in one step, garbage at padding. `read` as in `Decoder`."""
    apply: Any = decoder.apply
    return apply({"params": params}, tokens, cache, lengths, read, bases)[0]


@functools.partial(jax.jit, static_argnames=("decoder", "count"))
def head(decoder: Decoder, params: Params, hidden: Float[Array, "B T D"], count: int) -> Float[Array, "B count V"]:
    """Logits of the first `count` hidden states."""
    apply: Any = decoder.apply
    return apply({"params": params}, hidden[:, :count], method="logits")


# ---- decoding


@struct.dataclass
class DecodeState:
    """A generation under way."""

    held: Held
    tokens: Int[Array, "B N"]  # the new ones
    count: Int[Array, "B"]  # of them, so far
    done: Bool[Array, "B"]
    finite: Bool[Array, "B"]  # whether all logits were

    def placed(self) -> DecodeState:
        """The same in a program, whose compiler is told where every array lives."""
        axes = DecodeState(self.held.axes(), *(BATCH,) * 4)  # type: ignore[arg-type]
        return self.held.layout.constrain(self, axes)


@functools.partial(jax.jit, static_argnames="room", donate_argnames="held")
def start(held: Held, room: int) -> DecodeState:
    """A generation with nothing generated; `room` for so many new tokens. Donates `held`.

    One program makes all its arrays, so that a restored state's are placed alike and the loop is compiled once.
    """
    batch = held.hidden.shape[0]
    no = jnp.zeros((batch,), bool)
    return DecodeState(held, jnp.zeros((batch, room), jnp.int32), jnp.zeros((batch,), jnp.int32), no, ~no).placed()


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="run")
def decode_steps(
    decoder: Decoder,
    params: Params,
    bases: Any,
    run: DecodeState,
    sampling: Sampling,
    stop: Int[Array, "s"],
    steps: Int[Array, ""] | int,
    limit: Int[Array, ""] | int,
) -> DecodeState:
    """At most `steps` more tokens for every sequence that is not done; `limit` new tokens end a sequence."""
    apply: Any = functools.partial(decoder.apply, {"params": params})

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, run = carry
        logits = apply(run.held.hidden, method="logits")
        finite = run.finite & (run.done | jnp.isfinite(logits).all(-1))
        active = ~run.done & finite
        token = sample(logits, sampling, run.held.cache.length)
        rows = jnp.arange(token.shape[0])
        tokens = run.tokens.at[rows, jnp.where(active, run.count, run.tokens.shape[1])].set(token, mode="drop")
        count = run.count + active
        hidden, cache = apply(token[:, None], run.held.cache, active.astype(jnp.int32), bases=bases)
        held = run.held.then(cache, jnp.where(active[:, None], hidden[:, 0], run.held.hidden))
        done = run.done | ~finite | (token[:, None] == stop).any(-1) | (count >= limit)
        return i + 1, DecodeState(held, tokens, count, done, finite).placed()

    def unfinished(carry: tuple[Array, DecodeState]) -> Bool[Array, ""]:
        return (carry[0] < steps) & ~carry[1].done.all()

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), run))[1]
