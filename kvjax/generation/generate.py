"""Generation: prefill, then a compiled loop of decode steps over one state, its cache updated in place.

B sequences of a batch, T tokens fed at once, D model_dim, V vocabulary, N room for new tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import Cache, CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.errors import KvjaxError
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.nonfinite import find_first_nonfinite
from kvjax.models.params import Params

STREAM = 4  # tokens a call where text is shown as it comes


@struct.dataclass
class State:
    """Sequences that a model has read: all their tokens in the cache, and what predicts the next one."""

    cache: Cache
    hidden: Float[Array, "B D"]  # final hidden state of each sequence's last token

    def __str__(self) -> str:
        return str(self.cache)


@struct.dataclass
class Sampling:
    """How the next token is drawn: greedily, or from softmax(logits / temperature), cut to the likeliest tokens.

    A draw depends on the seed and the token's position only, so that batches and pauses change nothing.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # at most so many tokens
    top_p: Float[Array, ""]  # the fewest tokens that have this probability together
    seeds: Int[Array, "B"]
    greedy: bool = struct.field(pytree_node=False)
    cut: bool = struct.field(pytree_node=False)  # whether top_k or top_p say anything

    @classmethod
    def of(
        cls, temperature: float, top_k: int | None, top_p: float | None, seed: int, batch: int, vocab: int
    ) -> Sampling:
        """Sequence i draws with seed + i. Raises KvjaxError for values that mean nothing."""
        if not 0 <= temperature < float("inf"):
            raise KvjaxError(f"temperature={temperature}; expected 0 (greedy) or a positive number")
        if top_k is not None and top_k < 1:
            raise KvjaxError(f"top_k={top_k}; expected at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise KvjaxError(f"top_p={top_p}; expected more than 0 and at most 1")
        if not 0 <= seed < 2**31 - batch:
            raise KvjaxError(f"seed={seed}; expected 0 to {2**31 - batch - 1}")
        cut = (top_k or vocab) < vocab or (top_p or 1.0) < 1.0
        values = jnp.float32(temperature), jnp.int32(min(top_k or vocab, vocab)), jnp.float32(top_p or 1.0)
        return cls(*values, seed + jnp.arange(batch, dtype=jnp.int32), temperature == 0, cut)


@struct.dataclass
class DecodeState:
    """A generation under way."""

    state: State
    tokens: Int[Array, "B N"]  # the new ones
    count: Int[Array, "B"]  # of them, so far
    done: Bool[Array, "B"]
    finite: Bool[Array, "B"]  # whether all logits were


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, one entry per prompt.

    Attributes:
      texts: new text, without the stop token. tokens: new token ids, a stop token included.
      stopped: whether a stop token ended it (or else max_new_tokens did).
      state: everything read and written, to go on from; shared by the batch.
    """

    texts: list[str]
    tokens: list[list[int]]
    stopped: list[bool]
    state: State

    @property
    def text(self) -> str:
        """The text of the only prompt, or of the first."""
        return self.texts[0]


def plan(model: Model, cache: str) -> CachePlan:
    """Which cache each layer of the model has: its name (`str`), its bits, its bytes.

    Raises:
      KvjaxError: what `cache` says is no plan for this model, see `kvjax.caches.plan`.
    """
    return CachePlan.parse(cache, model.config)


def prefill(
    model: Model,
    prompt: str | Sequence[str],
    cache: str | CachePlan | State = "dense",
    *,
    max_len: int | None = None,
    chat: bool = True,
) -> State:
    """Reads prompts into a cache.

    Args:
      prompt: one text, or several of any lengths.
      cache: a plan, see `kvjax.caches.plan`; or a state, which is read on from and stays as it is.
      max_len: tokens that each sequence has room for; what the prompts need where None.
      chat: put each prompt into the model's chat template, where it has one and the sequence starts here.

    Raises:
      KvjaxError: one line that says what was expected.
    """
    return _read(model, prompt, cache, max_len, 0, chat).state


def generate(
    model: Model,
    prompt: str | Sequence[str],
    cache: str | CachePlan | State = "dense",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    max_len: int | None = None,
    chat: bool = True,
) -> Generation:
    """Generates text.

    Args:
      prompt, cache, max_len, chat: as for `prefill`; an empty prompt goes on from a state.
      max_new_tokens: at most so many per sequence.
      temperature: 0 is greedy.
      top_k, top_p: draw from the top_k likeliest tokens; from the fewest that have probability top_p together.
      seed: sequence i draws with seed + i.
      stop_tokens: ids that end a sequence; the model's own where None.

    Raises:
      KvjaxError: one line that says what was expected, or where the model's output stopped being finite.
    """
    prefilled = _read(model, prompt, cache, max_len, max_new_tokens, chat)
    sampling = Sampling.of(temperature, top_k, top_p, seed, prefilled.batch, model.config.vocab_size)
    *_, last = _decode(model, prefilled, max_new_tokens, sampling, stop_tokens, max_new_tokens)
    return last


def stream(
    model: Model,
    prompt: str,
    cache: str | CachePlan | State = "dense",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    max_len: int | None = None,
    chat: bool = True,
) -> Iterator[tuple[str, Generation]]:
    """`generate` for one prompt as it comes: pieces of text, each with all that was generated so far."""
    prefilled = _read(model, prompt, cache, max_len, max_new_tokens, chat)
    sampling = Sampling.of(temperature, top_k, top_p, seed, prefilled.batch, model.config.vocab_size)
    shown = ""
    for so_far in _decode(model, prefilled, max_new_tokens, sampling, stop_tokens, STREAM):
        text = so_far.text
        if text.endswith("\ufffd") and not so_far.stopped[0] and len(so_far.tokens[0]) < max_new_tokens:
            text = text.rstrip("\ufffd")  # a character whose last bytes are still to come
        yield text[len(shown) :], so_far
        shown = text


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A prefilled batch, with what it takes to do it again."""

    state: State
    bases: Any  # the plan's
    before: State | None  # what it went on from
    ids: list[Int[np.ndarray, "n"]]

    @property
    def batch(self) -> int:
        return len(self.ids)


def _read(
    model: Model,
    prompt: str | Sequence[str],
    cache: str | CachePlan | State,
    max_len: int | None,
    new: int,
    chat: bool,
) -> Prefilled:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    before = cache if isinstance(cache, State) else None
    if not prompts:
        raise KvjaxError("no prompts; expected at least one")
    if new < 0:
        raise KvjaxError(f"max_new_tokens={new}; expected 0 or more")
    ids = [_encode(model, text, chat and before is None) for text in prompts]
    if before is None:
        if empty := [i for i, each in enumerate(ids) if not len(each)]:
            raise KvjaxError(f"prompt {empty[0]} is empty; expected text")
        of = CachePlan.parse(cache, model.config) if isinstance(cache, str) else cache
        assert isinstance(of, CachePlan)
        state = empty_state(model, of, len(ids), _room(model, max(map(len, ids)), new, max_len))
    else:
        _check_fits(model, before, ids, new, max_len)
        state = jax.tree.map(jnp.copy, before)  # the loop writes into its own
    bases = load_bases(model, state.cache.plan)
    if any(map(len, ids)):
        state = _feed(Decoder(model.config), model.params, bases, state, *_padded(ids))
    return Prefilled(state, bases, before, ids)


def _encode(model: Model, text: str, chat: bool) -> Int[np.ndarray, "n"]:
    if chat and model.tokenizer.chat_template is not None and text:
        return model.tokenizer.encode(model.tokenizer.chat([{"role": "user", "content": text}]))
    return model.tokenizer.encode(text, special=True)


def _room(model: Model, prompt: int, new: int, max_len: int | None) -> int:
    """Tokens to allocate per sequence."""
    most = model.config.max_positions
    room = max_len or min(bucket(prompt + new), most)
    if not 0 < room <= most:
        raise KvjaxError(f"max_len={max_len}; expected 1 to {most}, what the model was made for")
    if prompt + new > room:
        stated = f"max_len={room}" if max_len else f"the model's {room} tokens"
        raise KvjaxError(f"a prompt of {prompt} tokens and {new} new ones; expected at most {stated} together")
    return room


def _check_fits(model: Model, state: State, ids: list[np.ndarray], new: int, max_len: int | None) -> None:
    shape, length = state.cache.shape, np.asarray(state.cache.length)
    if len(ids) != shape.batch:
        raise KvjaxError(f"{len(ids)} prompts for a state of {shape.batch} sequences; expected one for each")
    if max_len not in (None, shape.max_len):
        raise KvjaxError(f"max_len={max_len}; the state has room for {shape.max_len} tokens and keeps it")
    if len(state.cache.layers) != model.config.layers or state.hidden.shape[1] != model.config.model_dim:
        raise KvjaxError("the state was made by another model")
    for i, each in enumerate(ids):
        if length[i] + len(each) + new > shape.max_len:
            raise KvjaxError(
                f"sequence {i} holds {length[i]} tokens, {len(each)} more and {new} new ones do not fit;"
                f" the state was made with max_len={shape.max_len}"
            )


def bucket(tokens: int) -> int:
    """The size that is compiled for so many tokens: at most a quarter more (or 15), so that programs are few."""
    step = max(16, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def empty_state(model: Model, plan: CachePlan, batch: int, max_len: int) -> State:
    """Nothing read yet."""
    shape = CacheShape.of(model.config, batch, max_len, model.dtype)
    return State(plan.init(shape), jnp.zeros((batch, shape.model_dim), model.dtype))


def _padded(ids: Sequence[np.ndarray]) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    lengths = np.array([len(each) for each in ids], np.int32)
    tokens = np.zeros((len(ids), bucket(int(lengths.max()))), np.int32)
    for row, each in zip(tokens, ids, strict=True):
        row[: len(each)] = each
    return jnp.asarray(tokens), jnp.asarray(lengths)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def _feed(
    decoder: Decoder,
    params: Params,
    bases: Any,
    state: State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> State:
    """Reads `lengths` of the tokens into each sequence in one step. Donates `state`: its buffers are written into."""
    apply: Any = decoder.apply
    hidden, cache = apply({"params": params}, tokens, state.cache, lengths, bases=bases)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], 1)[:, 0]
    return State(cache, jnp.where(lengths[:, None] > 0, last, state.hidden))


def _decode(
    model: Model,
    prefilled: Prefilled,
    new: int,
    sampling: Sampling,
    stop_tokens: Sequence[int] | None,
    piece: int,
) -> Iterator[Generation]:
    """Runs the loop `piece` tokens at a time, the first alone; at least one Generation comes."""
    stop = [int(i) for i in (model.tokenizer.eos_ids if stop_tokens is None else stop_tokens)]
    decoder = Decoder(model.config)
    run = start(prefilled.state, bucket(new) if new else 0)
    while True:
        made = np.asarray(run.count)
        steps = min(piece, new - int(made.max())) if made.max() or piece >= new else 1
        run = decode_steps(
            decoder, model.params, prefilled.bases, run, sampling, jnp.array(stop, jnp.int32), steps, new
        )
        if not np.asarray(run.finite).all():
            raise KvjaxError(f"the logits are not finite: {_explain_nonfinite(model, prefilled, run)}")
        yield _generation(model, run, stop)
        if new == 0 or np.asarray(run.done).all():
            return


def start(state: State, room: int) -> DecodeState:
    """A generation with nothing generated; `room` for so many new tokens."""
    batch = state.hidden.shape[0]
    no = jnp.zeros((batch,), bool)
    return DecodeState(state, jnp.zeros((batch, room), jnp.int32), jnp.zeros((batch,), jnp.int32), no, ~no)


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
        logits = apply(run.state.hidden, method="logits")
        finite = run.finite & (run.done | jnp.isfinite(logits).all(-1))
        active = ~run.done & finite
        token = sample(logits, sampling, run.state.cache.length)
        rows = jnp.arange(token.shape[0])
        tokens = run.tokens.at[rows, jnp.where(active, run.count, run.tokens.shape[1])].set(token, mode="drop")
        count = run.count + active
        hidden, cache = apply(token[:, None], run.state.cache, active.astype(jnp.int32), bases=bases)
        state = State(cache, jnp.where(active[:, None], hidden[:, 0], run.state.hidden))
        done = run.done | ~finite | (token[:, None] == stop).any(-1) | (count >= limit)
        return i + 1, DecodeState(state, tokens, count, done, finite)

    def unfinished(carry: tuple[Array, DecodeState]) -> Bool[Array, ""]:
        return (carry[0] < steps) & ~carry[1].done.all()

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), run))[1]


def sample(logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """The next token of each sequence, drawn for its position. As likely as the last that is let in: in as well."""
    if sampling.greedy:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.cut:
        logits = jnp.where(logits >= min_kept_logit(logits, sampling), logits, -jnp.inf)

    def noise(seed: Array, position: Array) -> Float[Array, "V"]:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], logits.dtype)

    return (logits + jax.vmap(noise)(sampling.seeds, positions)).argmax(-1).astype(jnp.int32)


def min_kept_logit(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B 1"]:
    """The smallest logit that top_k, and then top_p among those, let in."""
    ordered = jnp.sort(logits, descending=True, axis=-1)
    ordered = jnp.where(jnp.arange(ordered.shape[-1]) < sampling.top_k, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(p, -1) - p
    kept = (before < sampling.top_p) & (ordered > -jnp.inf)
    return jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)


def _generation(model: Model, run: DecodeState, stop: list[int]) -> Generation:
    counts, rows = np.asarray(run.count), np.asarray(run.tokens)
    tokens = [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]
    stopped = [bool(each) and each[-1] in stop for each in tokens]
    bodies = [each[:-1] if ended else each for each, ended in zip(tokens, stopped, strict=True)]
    return Generation([model.tokenizer.decode(body) for body in bodies], tokens, stopped, run.state)


def _explain_nonfinite(model: Model, prefilled: Prefilled, run: DecodeState) -> str:
    """The same tokens again, with every layer looked at."""
    new = [row[:count] for row, count in zip(np.asarray(run.tokens), np.asarray(run.count), strict=True)]
    before = prefilled.before or empty_state(
        model, run.state.cache.plan, prefilled.batch, run.state.cache.shape.max_len
    )

    def chunks():
        if any(map(len, prefilled.ids)):
            yield _padded(prefilled.ids)
        for i in range(max(map(len, new))):
            column = [row[i : i + 1] for row in new]
            lengths = jnp.array([len(each) for each in column], jnp.int32)
            yield jnp.array([[int(each[0]) if len(each) else 0] for each in column], jnp.int32), lengths

    fault = find_first_nonfinite(Decoder(model.config), model.params, before.cache, chunks(), bases=prefilled.bases)
    return str(fault) if fault else "every layer is finite, the head is not"
