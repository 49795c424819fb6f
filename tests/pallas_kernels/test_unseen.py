"""What no query sees never reaches an output, in any implementation: NaN, infinities, tokens beyond the buffer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import INTERPRETED, QUICK, WITHOUT, packed, values
from test_packed_attention import Case, jitted, run
from test_remat_attention import Case as RematCase

from pallas_kernels.layout import MASKED, Packed
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.remat_attention import IMPLEMENTATIONS, reconstruct, remat_attention

NAMES = (*INTERPRETED, "reference")
REMAT = [name for name in NAMES if name in IMPLEMENTATIONS]
CASES = {
    "folded": Case(4, 4, stops=(150, 70), first=40, window=60, tokens=160),
    "one-group-of-two": Case(3, 8, group=32, rows=3, stops=(150, 70), first=40, window=60, tokens=160),
    "per-channel": Case(4, 2, "channel", group=16, stops=(150, 96), first=32, window=64, tokens=160),
    "exact": Case(16, 16, stops=(150, 70), first=40, window=60, tokens=160),
    "exact-keys": Case(16, 4, rows=1, stops=(150, 70), first=3, tokens=160),
    "exact-values": Case(2, 16, "channel", group=32, stops=(150, 96), first=40, tokens=160),
    "values-per-channel": Case(4, 4, "channel", stops=(150, 96), first=40, window=40, tokens=160),
}


def seen(case, start, stop, query: int) -> np.ndarray:
    """Which stored tokens a query of each sequence sees, [B, S]."""
    at, position = np.arange(case.tokens), np.asarray(start)[:, None] + query
    low = case.first if case.window is None else np.maximum(case.first, position - case.window + 1)
    return (at >= low) & (at < np.minimum(position + 1, np.asarray(stop)[:, None]))


def spoil(packed: Packed, bad: np.ndarray, number: float) -> Packed:
    """The tensor with a number for every scale, zero point or exact value of tokens that are bad, [B, S]."""
    if packed.scale is None:
        return dataclasses.replace(packed, planes=(jnp.where(bad[:, None, :, None], number, packed.planes[0]),))
    if packed.per == "token":
        where = bad[:, None, None]
    else:  # groups of nothing but bad tokens
        where = bad.reshape(len(bad), 1, -1, packed.group).all(-1)[..., None]
    scale, zero = (jnp.where(where, jnp.float16(number), a) for a in (packed.scale, packed.zero))
    return dataclasses.replace(packed, scale=scale, zero=zero)


def tensors_of(name: str, queries: int):
    """A case and its arguments."""
    case = CASES[name]._replace(queries=queries)
    q, keys, own, start, stop = case.tensors()
    if name == "values-per-channel":
        own = packed(values(2, *own.shape), case.value_bits, "channel", 32, case.pack)
    return case, q, keys, own, start, stop


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_one_query(name: str, case: str) -> None:
    case, q, keys, own, start, stop = tensors_of(case, 1)
    bad = ~seen(case, start, stop, 0)
    wanted = run(name, case, (q, keys, own, start, stop))
    found = run(name, case, (q, spoil(keys, bad, np.nan), spoil(own, bad, np.inf), start, stop))
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_several_queries(name: str, case: str) -> None:
    """A token that is not finite reaches the queries that see it, and no others; nor does a query."""
    case, q, keys, own, start, stop = tensors_of(case, 3)
    first, last = (seen(case, start, stop, query) for query in (0, 2))
    late = last & ~first  # tokens that only late queries see: their groups too, where scales are per channel
    q = q.at[1, 2].set(jnp.nan)
    wanted = run(name, case, (q, keys, own, start, stop))
    outside = ~(first | last | seen(case, start, stop, 1))
    clean = spoil(keys, outside, np.nan), spoil(own, outside, np.nan)
    found = run(name, case, (q, *clean, start, stop))
    for a, b in zip(found, wanted, strict=True):
        assert np.isnan(b[1, 2]).all() and np.isfinite(b[0]).all() and np.isfinite(b[1, :2]).all()
        np.testing.assert_array_equal(a, b)
    if case.per == "channel" and own.per == "channel":
        return
    output, _ = run(name, case, (q, keys, spoil(own, late, np.nan), start, stop))
    np.testing.assert_array_equal(output[:, 0], wanted[0][:, 0])
    assert late.any(1).all() and np.isnan(output[:, 2]).all((1, 2)).all()


@pytest.mark.skipif("native" not in NAMES, reason="another device's")
@pytest.mark.parametrize("without", WITHOUT, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_native_on_lesser_cpus(case: str, without) -> None:
    test_one_query("native", case)
    test_several_queries("native", case)


@pytest.mark.parametrize("name", NAMES)
def test_more_than_the_buffer_counts_as_the_buffer(name: str) -> None:
    """Under jit, where no check sees the values."""
    case = Case(4, 4, stops=(64, 64), tokens=64, queries=1)
    q, keys, own, start, stop = case.tensors()
    wanted = jitted(name, 0, None)(q, keys, own, start + 100, stop)
    found = jitted(name, 0, None)(q, keys, own, start + 100, stop + 77)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    nothing = jitted(name, 0, None)(q, keys, own, start, stop - 100)
    assert not np.asarray(nothing[0]).any() and (np.asarray(nothing[1]) <= MASKED / 2).all()


@pytest.mark.skipif("mosaic_tpu" not in NAMES, reason="another device's")
def test_bits_on_tpu_do_not_depend_on_the_batch() -> None:
    case = Case(4, 4, "channel", group=32, stops=(150, 96), tokens=160)
    args = case.tensors()
    both = run("mosaic_tpu", case, args)
    for b in range(2):
        alone = run("mosaic_tpu", case, jax.tree.map(lambda a: a[b : b + 1], args))  # noqa: B023
        for one, many in zip(alone, both, strict=True):
            np.testing.assert_array_equal(one[0], many[b])


REMAT_CASES = {
    "apart": RematCase(4, stops=(150, 96), first=32, window=64, tokens=160),
    "shared": RematCase(3, shared=True, per="token", stops=(150, 70), first=5, tokens=160),
    "own": RematCase(8, own=True, width=64, window=50, stops=(150, 96), tokens=160),
    "exact": RematCase(16, biased=True, normed=True, stops=(150, 70), first=40, tokens=160),
}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("case", REMAT_CASES)
@pytest.mark.parametrize("name", REMAT)
def test_remat(name: str, case: str, queries: int) -> None:
    case = REMAT_CASES[case]._replace(queries=queries)
    q, keys, own, rebuild, start, stop = case.tensors()
    all_seen = functools.reduce(np.logical_or, (seen(case, start, stop, query) for query in range(queries)))

    def call(q, keys, own, start, stop):
        how = {"first": case.first, "window": case.window, "implementation": name}
        own = keys if case.shared else own
        return remat_attention(q, keys, own, rebuild, start, stop, **how, interpret=INTERPRETED.get(name, False))

    call = jax.jit(call, compiler_options=QUICK)
    wanted = call(q, keys, own, start, stop)
    found = call(q, spoil(keys, ~all_seen, np.nan), spoil(own, ~all_seen, np.inf), start, stop)
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)
    if queries == 1 or own.per == "channel":
        return
    late = seen(case, start, stop, 2) & ~seen(case, start, stop, 0)
    output, _ = call(q, spoil(keys, late & case.shared, np.nan), spoil(own, late, np.nan), start, stop)
    np.testing.assert_array_equal(output[:, 0], wanted[0][:, 0])
    assert np.isnan(output[:, 2]).all((1, 2)).all()


@pytest.mark.parametrize("name", REMAT)
def test_reconstruct(name: str) -> None:
    delta = packed(values(1, 2, 1, 96, 64), 4, "token", 32, 32)
    below, up, until = values(2, 2, 96, 192), values(3, 64, 192), jnp.asarray([40, 96], jnp.int32)
    past = np.arange(96) >= np.asarray(until)[:, None]
    how = {"implementation": name, "interpret": INTERPRETED.get(name, False)}
    call = jax.jit(functools.partial(reconstruct, **how), compiler_options=QUICK)
    wanted = np.where(past[..., None], np.nan, call(below, delta, up, until))
    found = call(
        jnp.where(past[..., None], jnp.nan, below), spoil(delta, past, np.nan), up, until + 40 * (until > 90)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("fit", ["minmax", "mse"])
@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "native" and name != "jax_triton"])
def test_quantize_pack(name: str, per: str, fit: str) -> None:
    """Tokens that do not count may be anything: neither scales nor codes of the others change."""
    x, counted = values(1, 2, 1, 32, 64), jnp.arange(32) >= jnp.asarray([[5], [9]])
    how = {"bits": 4, "per": per, "group": 32, "fit": fit, "implementation": name}
    call = jax.jit(functools.partial(quantize_pack, **how, interpret=INTERPRETED.get(name, False)))
    spoilt = jnp.where(counted[:, None, :, None], x, jnp.asarray([jnp.nan, jnp.inf])[:, None, None, None])
    (planes, *scales), (others, *wanted) = call(spoilt, counted), call(x, counted)
    for a, b in zip(scales, wanted, strict=True):
        if per == "token":  # of the tokens that count
            a, b = (np.where(counted[:, None, None], c, 0) for c in (a, b))
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)
    both = [np.stack([plane[0] & 15, plane[0] >> 4], 2) for plane in (planes, others)]
    codes = [np.where(np.asarray(counted).reshape(2, 1, 2, 16, 1), c, 0) for c in both]
    np.testing.assert_array_equal(*codes)
