"""Search for the layer where a run stopped being finite: the same tokens run again and every layer is checked."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.caches.plan import Cache
from kvjax.mesh import fetch
from kvjax.models.decoder import Decoder
from kvjax.models.params import Params


class NonFinite(NamedTuple):
    """The first layer whose output is not finite, and the first token and sequence there."""

    sequence: int
    position: int
    layer: int | None  # None: the embedding already

    def __str__(self) -> str:
        where = "the embedding" if self.layer is None else f"layer {self.layer}"
        return f"first in {where}, at token {self.position} of sequence {self.sequence}"


def find_first_nonfinite(
    decoder: Decoder,
    params: Params,
    cache: Cache,
    chunks: Iterable[tuple[Int[Array, "B T"], Int[Array, "B"]]],
    read: str = "exact",
    bases: Any = None,
) -> NonFinite | None:
    """Feeds chunks to a model until the output of a layer is not finite.

    Args:
      decoder: the decoder.
      params: its parameters.
      cache: the cache at the start; not changed.
      chunks: per chunk, the tokens and how many of them are real in each sequence.
      read: as in `Decoder.__call__`.
      bases: as in `Decoder.__call__`.

    Returns:
      The place; None where every layer stays finite, so that only the logits can be at fault.
    """
    for tokens, lengths in chunks:
        at = fetch(cache.length)
        finite, cache = _feed(decoder, params, cache, tokens, lengths, read, bases)
        bad = ~fetch(finite) & (np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None])
        if bad.any():
            # The layer first: above it, a NaN reaches earlier tokens too, since masked tokens enter as 0 * NaN.
            layer = int(np.argmax(bad.any((1, 2))))
            token, sequence = (int(i[0]) for i in np.nonzero(bad[layer].T))
            return NonFinite(sequence, int(at[sequence]) + token, layer - 1 if layer else None)
    return None


@functools.partial(jax.jit, static_argnames=("decoder", "read"))
def _feed(
    decoder: Decoder, params: Params, cache: Cache, tokens: Array, lengths: Array, read: str, bases: Any
) -> tuple[Bool[Array, "L+1 B T"], Cache]:
    (_, cache), kept = decoder.apply({"params": params}, tokens, cache, lengths, read, bases, mutable=["hidden"])
    return jnp.stack([jnp.isfinite(h).all(-1) for h in kept["hidden"]["h"]]), cache
