"""Scores of tokens in one pass over the vocabulary, tile by tile, without storing the logits.

Logits are linear in the final hidden state h, l = h·E (E the head's rows). With p of the dense run, q of the other,
the dense argmax t and the expected row m = Σ_v p_v E_v of the dense run

    KL(dense || cache) = Σ_v p_v (l_v - l_t - l'_v + l'_t) + log p_t - log q_t
                       = (h - h')·(m - E_t) + log p_t - log q_t.

The dense run is thus kept as h, m, log p_t and t: 2 D + 2 numbers a token instead of V logits, computed once and
exact (docs/decisions.md). m is attention of h over the vocabulary with E as keys and values. Every term is relative
to the largest logit: where all probability lies on t, the first two are 0 whatever the size of the logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

ROWS = 1024  # tokens per pass
TILE = 1024  # vocabulary rows at a time: the logits of a tile stay in cache


@struct.dataclass
class DenseRun:
    """What is kept of the dense run of N tokens, enough to compare other runs with it."""

    hidden: Float[Array, "N D"]
    mean: Float[Array, "N D"]  # expected head row
    top: Int[Array, "N"]  # argmax of the logits
    top_nll: Float[Array, "N"]  # its negative log-likelihood


@struct.dataclass
class TokenScores:
    """Scores of N tokens.

    Attributes:
      nll: negative log-likelihood of the target, in nats.
      kld: KL(dense || this run), in nats.
      agree: 1 where the argmax of the logits is that of the dense run, else 0.
    """

    nll: Float[Array, "N"]
    kld: Float[Array, "N"]
    agree: Float[Array, "N"]


@jax.jit
def dense_run(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], targets: Int[Array, "N"]
) -> tuple[TokenScores, DenseRun]:
    """Scores the dense run itself and keeps what other runs are compared with.

    Args:
      hidden: final hidden states of N tokens.
      head: rows that give the logits of the V words.
      targets: the next token of each.

    Returns:
      Scores (KL 0, agreement 1) and the dense run.
    """

    def rows(h, y):
        state = _pass(h, head, y, y, keep=True)
        zeros = jnp.zeros_like(state["sum"])
        dense = DenseRun(h, state["mean"] / state["sum"][:, None], state["argmax"], _nll(state, state["max"]))
        return TokenScores(_nll(state, state["target"]), zeros, zeros + 1), dense

    return _by_rows(rows, hidden, targets)


@jax.jit
def compare(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], targets: Int[Array, "N"], dense: DenseRun
) -> TokenScores:
    """Scores a run against the dense one.

    Args:
      hidden: final hidden states of N tokens.
      head: rows that give the logits of the V words.
      targets: the next token of each.
      dense: the dense run of the same tokens.

    Returns:
      The scores.
    """

    def rows(h, y, ref):
        state = _pass(h, head, y, ref.top, keep=False)
        wide = ref.mean.dtype
        moved = (ref.hidden.astype(wide) - h.astype(wide)) * (ref.mean - jnp.take(head, ref.top, 0).astype(wide))
        kld = moved.sum(-1) - ref.top_nll + _nll(state, state["top"])
        kld = jnp.maximum(kld, 0)  # no KL is negative: what comes out below 0 is rounding
        return TokenScores(_nll(state, state["target"]), kld, (state["top"] >= state["max"]).astype(wide))

    return _by_rows(rows, hidden, targets, dense)


@jax.jit
def score_targets(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], targets: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    """The negative log-likelihood of each target in nats, and whether no other word has a larger logit."""

    def rows(h, y):
        state = _pass(h, head, y, y, keep=False)
        return _nll(state, state["target"]), state["target"] >= state["max"]

    return _by_rows(rows, hidden, targets)


def _nll(state: dict[str, Array], logit: Float[Array, "N"]) -> Float[Array, "N"]:
    """The negative log-likelihood of the words that have these logits."""
    return (state["max"] - logit) + jnp.log(state["sum"])


def _by_rows(f, *args):
    """Applies `f` to at most ROWS tokens at a time."""
    count = args[0].shape[0]
    size = min(count, ROWS)
    groups = -(-count // size)
    pad = lambda a: jnp.pad(a, ((0, groups * size - count),) + ((0, 0),) * (a.ndim - 1))  # noqa: E731
    split = jax.tree.map(lambda a: pad(a).reshape(groups, size, *a.shape[1:]), args)
    out = jax.lax.map(lambda x: f(*x), split)
    return jax.tree.map(lambda a: a.reshape(groups * size, *a.shape[2:])[:count], out)


def _pass(h: Array, head: Array, target: Array, top: Array, keep: bool) -> dict[str, Array]:
    """Walks over tiles of the vocabulary with an online softmax, as attention does over keys.

    Returns the maximum of the logits, the sum of exponentials relative to it and the logits of `target` and `top`;
    with `keep`, also the argmax and the sum of head rows weighted by the exponentials.
    """
    vocab, count = head.shape[0], h.shape[0]
    tile = min(TILE, vocab)
    dtype = jnp.promote_types(h.dtype, jnp.float32)

    def step(i, state):
        start = jnp.minimum(i * tile, vocab - tile)  # the last tile starts early where TILE does not divide V
        rows = jax.lax.dynamic_slice_in_dim(head, start, tile)
        logits = jnp.einsum("nd,vd->nv", h, rows, preferred_element_type=dtype)
        if vocab % tile:
            logits = jnp.where(start + jnp.arange(tile) >= i * tile, logits, -jnp.inf)
        best = logits.max(-1)
        maximum = jnp.maximum(state["max"], best)
        p, shrink = jnp.exp(logits - maximum[:, None]), jnp.exp(state["max"] - maximum)

        def pick(old, wanted):
            at = wanted - start
            found = jnp.take_along_axis(logits, jnp.clip(at, 0, tile - 1)[:, None], 1)[:, 0]
            return jnp.where((at >= 0) & (at < tile) & (wanted >= i * tile), found, old)

        new = {
            "max": maximum,
            "sum": state["sum"] * shrink + p.sum(-1),
            "target": pick(state["target"], target),
            "top": pick(state["top"], top),
        }
        if keep:
            new["argmax"] = jnp.where(
                best > state["max"], start + jnp.argmax(logits, -1).astype(jnp.int32), state["argmax"]
            )
            new["mean"] = state["mean"] * shrink[:, None] + p @ rows.astype(dtype)
        return new

    zeros = jnp.zeros(count, dtype)
    state = {"max": jnp.full(count, -jnp.inf, dtype), "sum": zeros, "target": zeros, "top": zeros}
    if keep:
        state |= {"argmax": jnp.zeros(count, jnp.int32), "mean": jnp.zeros(h.shape, dtype)}
    return jax.lax.fori_loop(0, -(-vocab // tile), step, state)
