"""The front: what a user asks of a model and gets back.

B sequences of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.checks import show
from kvjax.errors import KvjaxError
from kvjax.generation.decode import DecodeState, bucket, decode_steps, feed, head, hidden_states, pad, pad_stop, start
from kvjax.generation.prompts import Prompts
from kvjax.generation.request import Request, ask
from kvjax.generation.states import Held, State, grow
from kvjax.mesh import fetch
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model, check_model
from kvjax.models.nonfinite import find_first_nonfinite
from kvjax.programs import make_room

STREAM = 4  # tokens a call where text is shown as it comes
P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Generation:
    """What was generated, one entry per prompt.

    Attributes:
      texts: new text, without the stop token, up to the stop string.
      tokens: new token ids, a stop token included, or those of a stop string.
      stopped: whether a stop token or stop string ended it (or else max_new_tokens did).
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

    def __repr__(self) -> str:
        shown = [
            f"{text[:40]!r}{'...' * (len(text) > 40)} ({len(tokens)} tokens{', stopped' * stopped})"
            for text, tokens, stopped in zip(self.texts[:3], self.tokens, self.stopped, strict=False)
        ]
        more = [f"and {len(self.texts) - 3} more"] * (len(self.texts) > 3)
        return f"<Generation {', '.join(shown + more)}>"


def plan(model: Model, cache: str | CacheSpec | CachePlan) -> CachePlan:
    """Which cache each layer of the model has: its name (`str`), its bits, its bytes.

    Raises:
      KvjaxError: what `cache` says is no plan for this model, see `kvjax.caches.plan`.
    """
    check_model(model)
    return CachePlan.cast(cache, model.config)


def prefill(
    model: Model,
    prompt: Prompts,
    cache: str | CacheSpec | CachePlan | State = "dense",
    *,
    max_len: int | None = None,
    chat: bool = True,
    prefill_chunk: int | None = None,
) -> State:
    """Reads prompts into a cache.

    Args:
      model: what `kvjax.load` gives.
      prompt: as for `generate`.
      cache: as for `generate`.
      chat: as for `generate`.
      max_len: tokens that each sequence has room for; what the prompts need where None.
      prefill_chunk: as for `generate`.

    Raises:
      KvjaxError: one line that says what was expected.
    """
    options: dict[str, Any] = {"max_len": max_len, "chat": chat, "prefill_chunk": prefill_chunk}
    request = ask(model, prompt, cache, max_new_tokens=0, **options)
    with model.layout.entered():
        return State(model, _read(request, load_bases(model, request.plan)), request.read)


def logits(
    model: Model,
    ids: Prompts,
    cache: str | CacheSpec | CachePlan | State = "dense",
    *,
    read: str = "stored",
) -> Float[Array, "B T V"]:
    """Logits after every token, in one prefill.

    Args:
      model: what `kvjax.load` gives.
      ids: token ids: a list of ints or a 1-D array (B = 1), or B of one length, for example a 2-D array. Prompts of
        other kinds are taken as by `generate` with chat=False.
      cache: as for `generate`; a state stays as it is.
      read: "stored": every token is read as the cache stores it, its own included, as `parallel` scores do;
        "exact": as `generate` reads a prompt, exactly where the method keeps a residual.

    Returns:
      float32 or wider. [b, t] predicts the token that follows token t of sequence b.

    Raises:
      KvjaxError: one line that says what was expected.
    """
    request = ask(model, ids, cache, max_new_tokens=0, chat=False)
    counts = {len(each) for each in request.ids}
    if len(counts) > 1 or counts == {0}:
        raise KvjaxError(
            f"sequences of {' and '.join(map(str, sorted(counts)))} tokens; expected one length, above 0"
        )
    if not isinstance(read, str) or read not in ("stored", "exact"):
        raise KvjaxError(f"read={show(read)}; expected stored or exact")
    if read == "stored":
        request.plan.require_whole_windows("logits with read='stored'")
    decoder, bases = Decoder(model.config), load_bases(model, request.plan)
    with model.layout.entered():
        hidden = hidden_states(decoder, model.params, bases, _before(request).cache, *pad(request.ids), read)
        return head(decoder, model.params, hidden, counts.pop())


def _takes(arguments: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Gives a function the signature of another, so that a long list of arguments stands once."""

    def give(function: Callable[..., T]) -> Callable[P, T]:
        returns = inspect.signature(function).return_annotation
        vars(function)["__signature__"] = inspect.signature(arguments).replace(return_annotation=returns)
        return function

    return give


@_takes(ask)
def generate(*arguments: Any, **options: Any) -> Generation:  # noqa: D417, the arguments of `ask`
    """Generates text.

    Args:
      model: what `kvjax.load` gives.
      prompt: a text; token ids (a list or 1-D array of ints), taken as they are; chat messages (a list of
        {"role", "content"} dicts), put into the model's chat template; or a list of several of one of these kinds,
        of any lengths. An empty text goes on from a state; what follows a chat is its next turn.
      cache: the name of a plan, see `kvjax.caches.plan`, a CacheSpec for all layers, or a CachePlan; or a State,
        which is read on from and stays as it is. It is copied into a larger cache where it must grow.
      max_new_tokens: at most so many per sequence.
      temperature: 0 is greedy.
      top_k: draw from the so many likeliest tokens.
      top_p: draw from the fewest tokens that have this probability together.
      seed: sequence i draws with seed + i.
      stop_tokens: ids that end a sequence; the model's own where None.
      stop_strings: texts, one or several, that end a sequence as soon as its new text holds one, whichever tokens it
        is made of. The text ends before it; its tokens stay in the state.
      max_len: tokens that each sequence has room for; what the prompts and max_new_tokens need where None.
      chat: put each text into the model's chat template, where it has one and the sequence starts here or is a chat.
      prefill_chunk: read the prompts so many tokens at a time, in less memory; in one step where None. Where a method
        keeps a residual it changes the numbers: a token reads its own chunk exactly, and blocks that were complete
        before it as stored. What `streaming` scores see are chunks of the residual.

    Raises:
      KvjaxError: one line that says what was expected, or where the model's output stopped being finite.
    """
    request = ask(*arguments, **options)
    *_, last = _decode(request, request.max_new_tokens, request.max_new_tokens)
    return last


@_takes(ask)
def stream(*arguments: Any, **options: Any) -> Iterator[tuple[str, Generation]]:
    """`generate` for one prompt as it comes: pieces of text, each with all that was generated so far.

    The state of a piece is good until the next piece comes.
    """
    request = ask(*arguments, **options)
    if len(request.ids) > 1:
        raise KvjaxError(f"{len(request.ids)} prompts; expected one to stream, generate takes several")
    return _pieces(request)


def _pieces(request: Request) -> Iterator[tuple[str, Generation]]:
    shown = ""
    for so_far in _decode(request, 1, STREAM):
        text = so_far.text
        if not so_far.stopped[0] and len(so_far.tokens[0]) < request.max_new_tokens:
            text = _settled(text, request.stop_strings)
        yield text[len(shown) :], so_far
        shown = text


def _settled(text: str, stop_strings: Sequence[str]) -> str:
    """The text without what later tokens may change: a character's first bytes, the beginning of a stop string."""
    text = text.rstrip("\ufffd")
    begun = (n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)]


def _before(request: Request) -> Held:
    """What there is before the prompts are read."""
    if request.before is None:
        return Held.empty(request.model, request.plan, len(request.ids), request.max_len)
    if request.max_len == request.before.max_len:
        return request.before.held
    return grow(request.before.held, request.model, request.max_len)


def _read(request: Request, bases: Any) -> Held:
    """The prompts in a cache that is nobody else's."""
    make_room()
    held = _before(request)
    if request.before is not None and held is request.before.held:
        held = grow(held, request.model, request.max_len)  # a copy: the loop writes into it
    for tokens, lengths in _prompt_chunks(request):
        held = feed(Decoder(request.model.config), request.model.params, bases, held, tokens, lengths)
    return held


def _prompt_chunks(request: Request) -> Iterator[tuple[Int[Array, "B T"], Int[Array, "B"]]]:
    """What is fed at a time, and how much of it is real; chunks have one size, so that one program reads them."""
    longest, size = max(map(len, request.ids)), request.prefill_chunk
    if size is None or size >= longest:
        if longest:
            yield pad(request.ids)
        return
    for first in range(0, longest, size):
        yield pad([each[first : first + size] for each in request.ids], size)


def _decode(request: Request, first: int, piece: int) -> Iterator[Generation]:
    """Runs the loop for `first` tokens, then `piece` tokens at a time; at least one Generation comes."""
    model, new, bases = request.model, request.max_new_tokens, load_bases(request.model, request.plan)
    decoder, stop = Decoder(model.config), pad_stop(request.stop_tokens)
    first, piece = (1, 1) if request.stop_strings else (first, piece)  # each token may complete one
    with model.layout.entered():
        run = start(_read(request, bases), bucket(new) if new else 0)
    while True:
        made = int(fetch(run.count).max())
        steps = min(piece if made else first, new - made)
        with model.layout.entered():  # for this call alone: between two pieces the caller's own programs run
            run = decode_steps(decoder, model.params, bases, run, request.sampling, stop, steps, new)
        if not fetch(run.finite).all():
            raise KvjaxError(f"the logits are not finite: {_explain_nonfinite(request, bases, run)}")
        made_so_far = _generation(request, run)
        run = run.replace(done=run.done | np.array(made_so_far.stopped))
        done = new == 0 or fetch(run.done).all()
        yield made_so_far
        if done:
            return


def _generation(request: Request, run: DecodeState) -> Generation:
    tokens = _new_tokens(run)
    ended = [bool(each) and each[-1] in request.stop_tokens for each in tokens]
    bodies = [each[:-1] if by_token else each for each, by_token in zip(tokens, ended, strict=True)]
    texts = [_cut(_text(request, i, body), request.stop_strings) for i, body in enumerate(bodies)]
    read = [before.then(each) for before, each in zip(request.read, tokens, strict=True)]
    stopped = [by_token or found for by_token, (_, found) in zip(ended, texts, strict=True)]
    return Generation([text for text, _ in texts], tokens, stopped, State(request.model, run.held, read))


def _text(request: Request, sequence: int, body: list[int]) -> str:
    """New tokens as text; what goes on from a state begins with the blank that stands between the two."""
    tokenizer = request.model.tokenizer
    if request.before is None or len(request.ids[sequence]):
        return tokenizer.decode(body)
    return tokenizer.decode_next(body, request.read[sequence].last)


def _cut(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there is one."""
    ends = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))], bool(ends)


def _new_tokens(run: DecodeState) -> list[list[int]]:
    counts, rows = fetch(run.count), fetch(run.tokens)
    return [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]


def _explain_nonfinite(request: Request, bases: Any, run: DecodeState) -> str:
    """The same tokens again, with every layer looked at."""
    new = _new_tokens(run)

    def chunks():
        yield from _prompt_chunks(request)
        for i in range(max(map(len, new))):
            column = [row[i : i + 1] for row in new]
            lengths = jnp.array([len(each) for each in column], jnp.int32)
            yield jnp.array([each or [0] for each in column], jnp.int32), lengths

    model, cache = request.model, _before(request).cache
    with model.layout.entered():
        fault = find_first_nonfinite(Decoder(model.config), model.params, cache, chunks(), bases=bases)
    return str(fault) if fault else "every layer is finite, the head is not"
