"""`rotate` and `center` of KV: undone exactly where nothing is quantised, and codes of what they say where it is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import as_stored, make_chunk, rotated, tokens

from kvjax.caches.base import CacheShape, KVWeights
from kvjax.caches.registry import parse_spec
from kvjax.ops.dispatch import OPS, fresh_reasons, reasons, using
from kvjax.ops.key_form import turn
from kvjax.testing.layers import BATCH, ENDS, HEADS, KV_HEADS, TOKENS, both, quick_jit, schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOTH = "rotate=hadamard,center=bias"
WIDTH = 7


def matrix(dim: int) -> np.ndarray:
    """Blocks of H = [[H, H], [H, -H]] / sqrt 2 on the diagonal, as large as powers of two that divide `dim` are."""
    h = np.ones((1, 1))
    while dim % (2 * len(h)) == 0:
        h = np.kron(np.array([[1, 1], [1, -1]]), h) / np.sqrt(2)
    return np.kron(np.eye(dim // len(h)), h)


@functools.cache
def biases(head_dim: int, size: float = 30.0) -> np.ndarray:
    """Of keys and of values [2, K, d], integers."""
    return np.rint(size * np.random.default_rng(head_dim).standard_normal((2, KV_HEADS, head_dim)))


def chunk_of(head_dim: int, at, lengths, width: int, bias: np.ndarray | None, **weights: Any):
    """A chunk whose keys (before RoPE) and values have the bias in them; `weights` says what else there is."""
    chunk = make_chunk(head_dim, at, lengths, width)
    nothing: Any = jnp.zeros((1, 1))
    if bias is None:
        return chunk.replace(weights=KVWeights(nothing, nothing, **weights))
    k_bias, v_bias = bias.reshape(2, -1)
    weights = {"k_bias": k_bias, "v_bias": v_bias, **weights}
    return chunk.replace(k=chunk.k + bias[0], v=chunk.v + bias[1], weights=KVWeights(nothing, nothing, **weights))


@functools.cache
def run(text: str, head_dim: int, with_bias: bool = True, steps: int = WIDTH, dtype: Any = jnp.float64):
    """`attend`'s outputs, those over `materialize`, of every chunk, and the last cache."""
    with jax.enable_x64(True):
        cache = parse_spec(text).init(CacheShape(BATCH, TOKENS, HEADS, KV_HEADS, head_dim, 64, dtype))
        outputs, bias = [], biases(head_dim) if with_bias else None
        for at, lengths in schedule(steps):
            chunk = chunk_of(head_dim, at, lengths, steps, bias)
            output, plain, cache, *_ = both(cache, chunk, ())
            real = np.arange(steps) < lengths[:, None]
            outputs.append((np.asarray(output)[real], np.asarray(plain)[real]))
        return *(np.concatenate(each) for each in zip(*outputs, strict=True)), cache


# ---- the rotation


@pytest.mark.parametrize(("dim", "size"), [(8, 8), (64, 64), (128, 128), (80, 16), (96, 32)])
def test_turn_is_a_block_hadamard_and_its_own_inverse(dim: int, size: int) -> None:
    x = np.random.default_rng(dim).standard_normal((3, 2, dim))
    with jax.enable_x64(True):
        turned = turn(x)
        np.testing.assert_allclose(turned, x @ matrix(dim), atol=1e-13)
        np.testing.assert_allclose(turn(turned), x, atol=1e-13)
        np.testing.assert_allclose(np.abs(turn(np.eye(dim)[0])).max(), size**-0.5)  # an outlier is spread
    assert turn(jnp.ones(dim, jnp.bfloat16)).dtype == jnp.float32


# ---- exact where nothing is quantised


@pytest.mark.parametrize(
    ("text", "head_dim"),
    [
        ("k16v16@token(rotate=hadamard)", 16),
        ("k16v16@token(center=bias)", 16),
        (f"k16v16@token(rope=pre,{BOTH})", 16),
        (f"k16v16@token({BOTH})", 80),
        (f"k16v16@kivi(group=8,sink=3,{BOTH})", 16),
        (f"k16v16@kivi(group=8,sink=3,rope=pre,{BOTH})", 80),
        ("k16v16@kivi(group=8,sink=3,rotate=hadamard)", 96),
        ("k16v16@kivi(group=8,sink=3,rope=pre,rotate=hadamard)", 96),
        ("k16v16@kivi(group=8,sink=3,rotate=values,center=bias)", 16),
    ],
)
def test_undone_exactly(text: str, head_dim: int) -> None:
    wanted, *_ = run("k16v16@token", head_dim)
    output, plain, _ = run(text, head_dim)
    np.testing.assert_allclose(output, wanted, atol=1e-10)
    np.testing.assert_allclose(plain, wanted, atol=1e-10)


# ---- what codes are of


@pytest.mark.parametrize("head_dim", [16, 96])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("fields", ["rotate=hadamard", "rotate=values", "center=bias", BOTH])
def test_codes_are_of_what_is_centered_and_turned(fields: str, pre: bool, head_dim: int) -> None:
    """Keys and values that come back are an oracle's: to codes and back in the form that the fields name."""
    spec = parse_spec(f"k4v3@token({'rope=pre,' * pre}{fields})")
    bias, everything = biases(head_dim), np.full(BATCH, TOKENS)
    with jax.enable_x64(True):
        shape = CacheShape(BATCH, TOKENS, HEADS, KV_HEADS, head_dim, 64, jnp.float64)
        chunk = chunk_of(head_dim, 0 * everything, everything, TOKENS, bias)
        k, v, *_ = quick_jit(lambda cache, chunk: cache.materialize(chunk, ()))(spec.init(shape), chunk)
    at, turned = np.arange(TOKENS), [f"rotate={name}" in fields for name in ("hadamard", "values")]
    of_keys, of_values = (matrix(head_dim) if yes else np.eye(head_dim) for yes in (turned[0], any(turned)))
    taken = bias if "center" in fields else 0 * bias
    _, keys, values = (a[0] for a in tokens(head_dim))
    form = (lambda x: x) if pre else (lambda x: rotated(x, at))
    there = functools.partial(as_stored, per="token", group=head_dim, positions=at, sink=0)
    mean = form(np.broadcast_to(taken[0], keys.shape))
    back = there((form(keys + bias[0]) - mean) @ of_keys, 4) @ of_keys + mean
    np.testing.assert_allclose(k[0, :TOKENS], rotated(back, at) if pre else back, atol=1e-9)
    back = there((values + bias[1] - taken[1]) @ of_values, 3) @ of_values + taken[1]
    np.testing.assert_allclose(v[0, :TOKENS], back, atol=1e-9)


def test_models_without_biases_have_none_to_take_out() -> None:
    plain, _, cache = run("k2v2@kivi(group=8)", 16, with_bias=False)
    same, _, other = run("k2v2@kivi(group=8,center=bias)", 16, with_bias=False)
    np.testing.assert_allclose(same, plain, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, cache.store.packed, other.store.packed)


def test_the_bias_of_keys_stays_where_a_norm_follows_it() -> None:
    everything, shape = np.full(BATCH, TOKENS), CacheShape(BATCH, TOKENS, HEADS, KV_HEADS, 16, 64, jnp.float64)
    with jax.enable_x64(True):
        chunk = chunk_of(16, 0 * everything, everything, TOKENS, biases(16), k_norm=jnp.ones(16))
        append = quick_jit(lambda cache, chunk: cache.append(chunk, ())[0].packed)
        plain, centered = (
            append(parse_spec(text).init(shape), chunk) for text in ("k4v4@token", "k4v4@token(center=bias)")
        )
    np.testing.assert_array_equal(plain[0].zero, centered[0].zero)
    assert np.abs(plain[1].zero - centered[1].zero).max() > 1


# ---- kernels


@functools.cache
def step(text: str, names: tuple[str, ...], interpret: bool) -> tuple[np.ndarray, list[str]]:
    """Outputs of a decode step in float32 with these implementations, and why some did not serve it."""
    cache = run(text, 64)[2]
    single = lambda a: jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else a.dtype)  # noqa: E731
    with jax.enable_x64(True):
        chunk = chunk_of(64, ENDS - 1, np.ones(BATCH, int), 1, biases(64))
        cache, chunk = jax.tree.map(single, (cache, chunk))
    with fresh_reasons(), using(interpret, packed_attention=names):
        output = quick_jit(lambda cache, chunk: cache.attend(chunk, ())[0])(cache, chunk)
        return np.asarray(output), [reason.text for reason in reasons() if reason.op == "packed_attention"]


@pytest.mark.parametrize("name", ["native", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("text", ["k4v2@token(rotate=hadamard)", "k3v4@kivi(rotate=hadamard)"])
def test_kernels_read_turned_keys(text: str, name: str) -> None:
    assert name in OPS["packed_attention"]
    (plain, _), (found, refused) = step(text, ("xla",), False), step(text, (name,), name != "native")
    assert not refused
    np.testing.assert_allclose(found, plain, atol=2e-4 * np.abs(plain).max())


def test_kernels_leave_centered_keys_to_xla() -> None:
    _, refused = step("k4v2@token(center=bias)", ("native", "xla"), False)
    assert refused == ["keys that need their position; kernels read keys after RoPE, with their bias"]
