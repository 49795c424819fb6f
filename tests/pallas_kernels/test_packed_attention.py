"""Every implementation of packed attention against plain float32, in one suite."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import INTERPRETED as KERNELS
from helpers import QUICK, WITHOUT, packed, stored, values

from pallas_kernels.layout import MASKED, PLANES, Packed
from pallas_kernels.packed_attention import packed_attention

BITS = (*PLANES, 16)


class Case(NamedTuple):
    key_bits: int
    value_bits: int
    per: str = "token"  # of keys; values are per token
    head_dim: int = 64
    kv_heads: int = 2
    rows: int = 2  # query heads per kv head
    queries: int = 1
    group: int | None = None  # of channels; the whole head where None
    pack: int = 32
    first: int = 0
    window: int | None = None
    stops: tuple[int, ...] = (320, 77)
    tokens: int = 320

    @functools.cache  # kernels share them  # noqa: B019
    def tensors(self, dtype=jnp.float32, make=packed):
        shape = len(self.stops), self.kv_heads, self.tokens, self.head_dim
        channels = self.group or self.head_dim
        keys = make(values(1, *shape), self.key_bits, self.per, channels if self.per == "token" else 32, self.pack)
        own = make(values(2, *shape), self.value_bits, "token", channels, self.pack)
        q = values(3, len(self.stops), self.queries, self.kv_heads * self.rows, self.head_dim, dtype=dtype)
        stop = jnp.asarray(self.stops, jnp.int32)
        return q, keys, own, jnp.maximum(stop - self.queries, 0), stop


def jitted(name: str, first: int, window: int | None):
    call = functools.partial(
        packed_attention, first=first, window=window, implementation=name, interpret=KERNELS.get(name, False)
    )
    return jax.jit(call, compiler_options=QUICK)


reference_of = functools.cache(functools.partial(jitted, "reference"))  # one program serves many cases


def run(name: str, case: Case, tensors):
    return jitted(name, case.first, case.window)(*tensors)


@functools.cache
def reference(case: Case, dtype=jnp.float32):
    """On the values that numpy says are stored."""
    return reference_of(case.first, case.window)(*case.tensors(dtype, stored))


def check(found, wanted, tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
        seen = np.asarray(b) > MASKED / 2  # an lse of no key at all is compared by itself
        np.testing.assert_array_equal(np.asarray(a) > MASKED / 2, seen)
        size = np.abs(b[seen]).max(initial=1e-3)
        np.testing.assert_allclose(a[seen], b[seen], atol=tolerance * size, rtol=0)


SHAPES = ((64, 2, 2, 1), (80, 1, 4, 3), (96, 2, 1, 1), (128, 1, 8, 1), (256, 1, 3, 2))


def rotated(index: int, key_bits: int, value_bits: int) -> Case:
    """Each pair of widths with another choice of everything else; few shapes, so that references compile once."""
    head_dim, kv_heads, rows, queries = SHAPES[index % len(SHAPES)]
    group = (None, 32 if head_dim % 32 == 0 else 16)[index // 2 % 2]
    rest = {"pack": (32, 64, 32)[index % 3], "first": (0, 5)[queries % 2], "window": (None, 50)[head_dim == 96]}
    per = ("token", "channel")[index // 5 % 2]
    return Case(key_bits, value_bits, per, head_dim, kv_heads, rows, queries, group, **rest)


PAIRS = [rotated(index, *pair) for index, pair in enumerate(itertools.product(BITS, BITS))]
OFTEN = (0, 3)  # by so many places in BITS the widths of a pair differ that interpreters are run with every time


def interpreted() -> list[Any]:
    """All pairs for interpreters, which are slow: each width is run twice every time, other pairs once a week."""
    rows = itertools.product(range(len(BITS)), repeat=2)
    rare = [(value - key) % len(BITS) not in OFTEN for key, value in rows]
    return [
        pytest.param(case, marks=pytest.mark.weekly if each else ()) for case, each in zip(PAIRS, rare, strict=True)
    ]


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"k{case.key_bits}v{case.value_bits}")
def test_every_pair_of_widths(case: Case) -> None:
    """Of the first kernel; the others have files of their own, to be run side by side."""
    name = next(iter(KERNELS))
    check(run(name, case, case.tensors()), reference(case), 3e-6)


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("bits", BITS)
def test_reference_reads_what_is_stored(bits: int, per: str) -> None:
    case = Case(bits, bits, per, group=32)
    check(run("reference", case, case.tensors()), reference(case), 3e-6)


@pytest.mark.skipif("native" not in KERNELS, reason="another device's")
@pytest.mark.parametrize("without", WITHOUT, indirect=True)
@pytest.mark.parametrize("case", PAIRS[::3], ids=lambda case: f"k{case.key_bits}v{case.value_bits}")
def test_native_on_lesser_cpus(case: Case, without) -> None:
    check(run("native", case, case.tensors()), reference(case), 3e-6)


@pytest.mark.skipif("native" not in KERNELS, reason="another device's")
@pytest.mark.parametrize("without", WITHOUT, indirect=True)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pack", [24, 72])
def test_native_tiles_of_any_size_on_lesser_cpus(pack: int, rows: int, without) -> None:
    case = Case(4, 2, rows=rows, pack=pack, stops=(360, 71), tokens=360, window=100)
    check(run("native", case, case.tensors()), reference(case), 3e-6)


@pytest.mark.skipif("native" not in KERNELS, reason="another device's")
@pytest.mark.parametrize("bits", [(8, 8), (3, 5), (1, 6)])
@pytest.mark.parametrize(("per", "pack"), [("token", 40), ("token", 96), ("channel", 160)])
def test_native_packing_blocks_of_any_size(per: str, pack: int, bits: tuple[int, int]) -> None:
    case = Case(*bits, per, 128, rows=3, group=32, pack=pack, stops=(480, 77), tokens=480)
    check(run("native", case, case.tensors()), reference(case), 3e-6)


@pytest.mark.skipif("native" not in KERNELS, reason="another device's")
@pytest.mark.parametrize("without", WITHOUT, indirect=True)
@pytest.mark.parametrize(("per", "queries", "rows"), [("token", 32, 3), ("channel", 31, 4), ("token", 128, 1)])
def test_native_chunks_of_a_few_dozen_queries(per: str, queries: int, rows: int, without) -> None:
    """As streaming scores them; one of the sequences is short."""
    case = Case(4, 2, per, rows=rows, queries=queries, group=32, window=100)
    check(run("native", case, case.tensors()), reference(case), 3e-6)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "native"])
@pytest.mark.parametrize(("per", "queries", "rows"), [("token", 32, 3), ("channel", 31, 4), ("token", 17, 1)])
def test_several_launches_serve_chunks_of_a_few_dozen_queries(name: str, per: str, queries: int, rows: int) -> None:
    """As streaming scores them, whether or not launches divide them evenly; one of the sequences is short."""
    case = Case(4, 2, per, rows=rows, queries=queries, group=32, window=100)
    check(run(name, case, case.tensors()), reference(case), 3e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_longer_chunks_are_refused(name: str) -> None:
    case = Case(4, 2, rows=3, queries=43)
    with pytest.raises(NotImplementedError, match="129 query rows per kv head; expected at most 128"):
        run(name, case, case.tensors())


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "native"])
def test_a_query_of_more_heads_than_a_launch_takes_is_refused(name: str) -> None:
    case = Case(4, 2, rows=17)
    with pytest.raises(NotImplementedError, match="17 query rows per kv head; expected at most 16"):
        run(name, case, case.tensors())


LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 2048, 4095, 4096, 4097, 0)


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_length(name: str, per: str) -> None:
    """In one ragged batch; the last sequence has nothing."""
    case = Case(4, 2, per, kv_heads=1, group=32, stops=LENGTHS, tokens=4128)
    tensors = case.tensors()
    output, lse = run(name, case, tensors)
    check((output, lse), reference(case), 3e-6)
    assert not np.asarray(output[-1]).any() and (np.asarray(lse[-1]) <= MASKED / 2).all()
    again = run(name, case, tensors)
    for a, b in zip(again, (output, lse), strict=True):
        np.testing.assert_array_equal(a, b)  # the same from run to run


@pytest.mark.parametrize("name", KERNELS)
def test_parts_merge_exactly(name: str) -> None:
    """Attention over [0, 100) and over [100, stop) is attention over [0, stop)."""
    case = Case(4, 4, "channel", group=32, stops=(320, 290))
    q, keys, own, start, stop = case.tensors()
    whole, lse = run("reference", case, (q, keys, own, start, stop))
    below = run(name, case, (q, keys, own, start, jnp.minimum(stop, 100)))
    above = run(name, case._replace(first=100), (q, keys, own, start, stop))
    weights = [jnp.exp(part[1] - lse)[..., None] for part in (below, above)]
    np.testing.assert_allclose(sum(weights), jnp.ones_like(weights[0]), atol=1e-5)
    merged = weights[0] * below[0] + weights[1] * above[0]
    np.testing.assert_allclose(merged, whole, atol=3e-6 * float(jnp.abs(whole).max()) * 10)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_queries(name: str) -> None:
    case = Case(4, 2, "channel", 128, rows=4, group=32)
    check(run(name, case, case.tensors(jnp.bfloat16)), reference(case, jnp.bfloat16), 2e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_what_lies_outside_does_not_matter(name: str) -> None:
    """Scales beyond `stop`, before `first` and outside of the window are huge, and nobody notices."""
    case = Case(8, 3, stops=(300, 200), first=40, window=100)
    q, keys, own, start, stop = case.tensors()
    at = jnp.arange(case.tokens)
    unseen = (at < jnp.maximum(case.first, start[:, None] - case.window + 1)) | (at >= stop[:, None])

    def spoil(tensor: Packed) -> Packed:
        scale = jnp.where(unseen[:, None, None], jnp.float16(6e4), tensor.scale)
        return Packed(tensor.planes, scale, tensor.zero, tensor.bits, tensor.per, tensor.group, tensor.pack)

    wanted = reference(case)
    check(run(name, case, (q, spoil(keys), spoil(own), start, stop)), wanted, 3e-6)


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("name", KERNELS)
def test_groups_that_did_not_fit_read_as_nan(name: str, per: str, which: str) -> None:
    case = Case(4, 4, per, group=None if per == "token" else 32)
    q, keys, own, start, stop = case.tensors()
    bad = keys if which == "keys" else own
    bad = Packed(bad.planes, bad.scale.at[0, 0, 0, 10].set(jnp.nan), bad.zero, bad.bits, *form(bad))
    tensors = (q, bad, own, start, stop) if which == "keys" else (q, keys, bad, start, stop)
    output, _ = run(name, case, tensors)
    found = np.isnan(np.asarray(output)).any((1, 3))
    assert found[0, :2].all() and not found[0, 2:].any() and not found[1].any()


WRONG = {
    "q: .* expected": lambda q, k, v, a, b: (q[0], k, v, a, b),
    "q: .* does not fit keys": lambda q, k, v, a, b: (q[..., :32], k, v, a, b),
    "q: 3 heads": lambda q, k, v, a, b: (q[:, :, :3], k, v, a, b),
    "keys: a plane of": lambda q, k, v, a, b: (
        q,
        k.__class__((k.planes[0][:, :1],) * 2, k.scale, k.zero, 3, *form(k)),
        v,
        a,
        b,
    ),
    "keys: 7 bits": lambda q, k, v, a, b: (q, Packed(k.planes, k.scale, k.zero, 7, *form(k)), v, a, b),
    "values.scale": lambda q, k, v, a, b: (
        q,
        k,
        Packed(v.planes, v.scale[..., 1:], v.zero, v.bits, *form(v)),
        a,
        b,
    ),
    "values.zero": lambda q, k, v, a, b: (q, k, Packed(v.planes, v.scale, None, v.bits, *form(v)), a, b),
    "start": lambda q, k, v, a, b: (q, k, v, a[:1], b),
    "stop: .* expected": lambda q, k, v, a, b: (q, k, v, a, b.astype(jnp.float32)),
    "stop: 321 is beyond": lambda q, k, v, a, b: (q, k, v, a, b + 1),
}


def form(tensor: Packed) -> tuple[str, int, int]:
    return tensor.per, tensor.group, tensor.pack


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named_before_the_launch(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(*WRONG[message](*Case(4, 4).tensors()), implementation="native")


@pytest.mark.parametrize(("settings", "message"), [({"first": -1}, "first"), ({"window": 0}, "window")])
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(*Case(4, 4).tensors(), implementation="native", **settings)
    with pytest.raises(ValueError, match=r"implementation .cuda.; expected one of"):
        packed_attention(*Case(4, 4).tensors(), implementation="cuda")
