"""Every implementation of rematerialising attention against plain float32."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import INTERPRETED, QUICK, WITHOUT, packed, values

from pallas_kernels.remat_attention import IMPLEMENTATIONS, reconstruct, remat_attention
from pallas_kernels.remat_attention.weights import Rebuild

KERNELS = [name for name in INTERPRETED if name in IMPLEMENTATIONS]


class Case(NamedTuple):
    bits: int
    shared: bool = False  # one stream for keys and values
    per: str = "channel"  # of keys
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    width: int = 128  # of the rows
    own: bool = False  # rows of each kv head instead of one for all
    biased: bool = False
    normed: bool = False
    queries: int = 1
    first: int = 0
    window: int | None = None
    stops: tuple[int, ...] = (192, 77)
    tokens: int = 192
    group: int = 64  # of channels

    @functools.cache  # noqa: B019
    def tensors(self, dtype=jnp.float32):
        groups = self.kv_heads if self.own else 1
        rows = len(self.stops), groups, self.tokens, self.width
        keys = packed(values(1, *rows), self.bits, self.per, self.group if self.per == "token" else 32, 32)
        own = keys if self.shared else packed(values(2, *rows), self.bits, "token", self.group, 32)
        m = self.head_dim if self.own else self.kv_heads * self.head_dim
        angle = np.outer(np.arange(self.tokens), 10000.0 ** -np.tile(np.linspace(0, 1, self.head_dim // 2), 2))
        cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
        bias = values(4, self.kv_heads, self.head_dim) if self.biased else None
        norm = values(5, self.head_dim) if self.normed else None
        rebuild = Rebuild(values(3, groups, self.width, m) * self.width**-0.5, cos, sin, bias, norm)
        q = values(6, len(self.stops), self.queries, self.heads, self.head_dim, dtype=dtype)
        stop = jnp.asarray(self.stops, jnp.int32)
        return q, keys, own, rebuild, jnp.maximum(stop - self.queries, 0), stop


CASES = [
    Case(4),
    Case(2, biased=True, normed=True, queries=3),
    Case(3, shared=True, per="token", heads=4, kv_heads=4, first=5),
    Case(8, own=True, width=64, window=50),
    Case(4, heads=8, kv_heads=1, head_dim=128, width=256),
    Case(16, biased=True),
    Case(6, own=True, width=64, per="token", normed=True, head_dim=128),
]


def run(name: str, case: Case, dtype=jnp.float32):
    q, keys, own, *rest = case.tensors(dtype)
    settings = {"first": case.first, "window": case.window, "implementation": name}

    def call(q, keys, own, *rest):
        own = keys if case.shared else own  # the same object also within jit
        return remat_attention(q, keys, own, *rest, **settings, interpret=INTERPRETED.get(name, False))

    return jax.jit(call, compiler_options=QUICK)(q, keys, own, *rest)


@functools.cache
def reference(case: Case):
    return [np.asarray(a) for a in run("reference", case)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_parity(name: str, case: Case) -> None:
    for found, wanted in zip(run(name, case), reference(case), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=5e-6 * np.abs(wanted).max(), rtol=0)


NATIVE = pytest.mark.skipif("native" not in KERNELS, reason="another device's")
SHAPES = [  # head_dims that fill no vector, many rows, a ring of several packing blocks, sequences that have nothing
    Case(1, head_dim=80, heads=6, kv_heads=2, width=96, queries=2, first=3, per="token", shared=True, group=32),
    Case(5, head_dim=24, heads=8, kv_heads=1, width=40, queries=2, group=8, normed=True, biased=True),
    Case(3, own=True, heads=6, width=64, stops=(191, 0), window=7),
    Case(16, shared=True, head_dim=40, heads=3, kv_heads=3, width=96, queries=4, stops=(5, 100)),
    Case(8, own=True, heads=20, kv_heads=4, head_dim=32, width=32, group=32, queries=3),
]


@NATIVE
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_native_shapes(case: Case) -> None:
    test_parity("native", case)


@NATIVE
@pytest.mark.parametrize("without", WITHOUT[1:], indirect=True)
@pytest.mark.parametrize("case", CASES[1:6] + SHAPES[:2], ids=str)
def test_native_on_lesser_cpus(case: Case, without) -> None:
    test_parity("native", case)


@NATIVE
@pytest.mark.parametrize("without", WITHOUT[1:], indirect=True)
def test_native_reconstructs_on_lesser_cpus(without) -> None:
    test_reconstruct("native", "token")


@NATIVE
def test_native_refuses() -> None:
    delta = packed(values(1, 1, 1, 32, 64), 3, "token", 32, 32)
    for below in (values(2, 1, 32, 20), values(2, 1, 32, 32, dtype=jnp.bfloat16)):
        with pytest.raises(NotImplementedError, match="expected a multiple of 16 in float32"):
            reconstruct(below, delta, values(3, 64, below.shape[2]), jnp.asarray([32]), implementation="native")


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_queries(name: str) -> None:
    for found, wanted in zip(
        run(name, CASES[0], jnp.bfloat16), run("reference", CASES[0], jnp.bfloat16), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=2e-2 * float(jnp.abs(wanted).max()), rtol=0)


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("name", KERNELS)
def test_reconstruct(name: str, per: str) -> None:
    delta = packed(values(1, 2, 1, 96, 64), 3, per, 32, 32)
    below, up, until = values(2, 2, 128, 192), values(3, 64, 192), jnp.asarray([64, 96], jnp.int32)

    def call(name: str) -> np.ndarray:
        settings = {"implementation": name, "interpret": INTERPRETED.get(name, False)}
        run = jax.jit(functools.partial(reconstruct, **settings), compiler_options=QUICK)
        return np.asarray(run(below, delta, up, until))

    found, wanted, below_them = call(name), call("reference"), np.asarray(below)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    for b, end in enumerate((64, 96)):
        np.testing.assert_array_equal(found[b, end:], below_them[b, end:])
        assert (found[b, :end] != below_them[b, :end]).any(-1).all()


WRONG = {
    "values: .* do not fit": lambda q, k, v, r, a, b: (q[:1], k, v, r, a, b),
    "rebuild.up": lambda q, k, v, r, a, b: (q, k, v, Rebuild(r.up[:, 1:], r.cos, r.sin), a, b),
    "rebuild.cos": lambda q, k, v, r, a, b: (q, k, v, Rebuild(r.up, r.cos[:100], r.sin), a, b),
    "rebuild.bias": lambda q, k, v, r, a, b: (q, k, v, Rebuild(r.up, r.cos, r.sin, r.cos[:3]), a, b),
    "stop: 193 is beyond": lambda q, k, v, r, a, b: (q, k, v, r, a, b + 1),
    "start": lambda q, k, v, r, a, b: (q, k, v, r, a[:1], b),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remat_attention(*WRONG[message](*CASES[0].tensors()), implementation="reference")
