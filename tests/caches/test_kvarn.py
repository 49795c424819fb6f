"""KVarN and OScaR: what is read back, what it costs, and what gains of tokens are for."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import as_stored, make_chunk, rotated, tokens

from kvjax.caches.base import CacheShape
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.ops.dispatch import fresh_reasons, reasons, using
from kvjax.quant.basis import hadamard
from kvjax.quant.gains import gains_of
from kvjax.testing.layers import BATCH, ENDS, HEADS, KV_HEADS, TOKENS, quick_jit

R, SINK = 16, 3
SHAPE = CacheShape(BATCH, TOKENS + 1, HEADS, KV_HEADS, 16, 64, jnp.float64)
ALL = np.full(BATCH, TOKENS)


def stored(text: str, k_scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a window of the first sequence, as they are read back; keys times a scale of each token."""
    with jax.enable_x64(True):
        chunk = make_chunk(16, 0 * ALL, ALL, TOKENS, read="stored")
        chunk = chunk if k_scale is None else dataclasses.replace(chunk, k=chunk.k * k_scale[:, None, None])
        read = quick_jit(lambda cache, chunk: cache.materialize(chunk, ())[:2])
        k, v = read(parse_spec(text).init(SHAPE), chunk)
    return np.asarray(k[0, :TOKENS]), np.asarray(v[0, :TOKENS])


def gains(block: np.ndarray, counted: np.ndarray, per: str, how: str) -> np.ndarray:
    """Of a block [K, R, d], as `kvjax.quant.gains` has them: tests/quant/test_gains.py."""
    if how == "none":
        return np.ones((1, 1, 1))
    with jax.enable_x64(True):
        some = functools.partial(gains_of, per=per, how=how)
        return np.asarray(quick_jit(some)(jnp.asarray(block), jnp.asarray(counted)), np.float64)


@pytest.mark.parametrize(
    ("text", "how"),
    [
        (f"kvarn4v3(residual={R},sink={SINK})", ("balanced", "balanced")),
        (f"omni4v3(residual={R},group={R},sink={SINK})", ("norm", "none")),
    ],
)
def test_what_is_read_back(text: str, how: tuple[str, str]) -> None:
    """H ((scale code + zero) gain), block by block: the last one on its own tokens, sinks not counted."""
    found, at = stored(text), np.arange(TOKENS)
    for x, per, gain_of, back in zip(
        (rotated(tokens(16)[1][0], at), tokens(16)[2][0]), ("channel", "token"), how, found, strict=True
    ):
        turned = x @ hadamard(16)
        for start in range(0, TOKENS, R):
            rows = slice(start, min(start + R, TOKENS))
            block, counted = turned[rows].swapaxes(0, 1), (at[rows] >= SINK)[:, None]
            gain = gains(block, counted, per, gain_of)
            even = (block / gain).swapaxes(0, 1)
            wanted = as_stored(even, 4 if per == "channel" else 3, per, R if per == "channel" else 16, at[rows], SINK)
            wanted = (wanted.swapaxes(0, 1) * gain).swapaxes(0, 1) @ hadamard(16)
            some = at[rows] >= SINK
            np.testing.assert_allclose(back[rows][some], wanted[some], atol=1e-9)


@pytest.mark.parametrize("text", [f"kvarn2v2(residual={R},sink=0)", f"omni2v2(residual={R},group={R})"])
def test_tokens_of_other_sizes_harm_no_others(text: str) -> None:
    """With one token in eight ten times as large, the others are wrong by at most twice as much as without."""
    large = np.where(np.arange(TOKENS) % 8 == 5, 10.0, 1.0)
    wanted = rotated(tokens(16)[1][0], np.arange(TOKENS))

    def error(text: str, scale: np.ndarray) -> float:
        off = stored(text, scale)[0] - wanted * scale[:, None, None]
        return float(np.square(off[large == 1]).mean())

    without = f"k2v2@kivi(residual={R},group={R},rotate=hadamard)"
    assert error(text, large) < 2 * error(text, np.ones(TOKENS))
    assert error(text, large) < 0.2 * error(without, large)


def test_nothing_is_lost_where_nothing_is_quantised() -> None:
    attend = quick_jit(lambda cache, chunk: cache.attend(chunk, ())[0])
    with jax.enable_x64(True):
        chunk = make_chunk(16, 0 * ALL, ALL, TOKENS, read="stored")
        texts = "k16v16@token", f"kvarn16v16(residual={R},sink=0)", f"omni16v16(residual={R},group={R})"
        wanted, *found = (np.asarray(attend(parse_spec(text).init(SHAPE), chunk)) for text in texts)
    for output in found:
        np.testing.assert_allclose(output, wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("text", "head_dim", "bits"),
    [
        ("kvarn4v2", 128, (4.375 + 2.375) / 2),
        ("kvarn4v2", 64, (4.5 + 2.625) / 2),
        ("kvarn2v2", 128, 2.375),
        ("kvarn2v2", 64, 2.5625),
        ("omni2v2", 128, (2 + 32 / 32 + 16 / 128 + 2 + 32 / 32) / 2),
        ("kvarn16v2", 128, (16 + 2.375) / 2),
    ],
)
def test_bits_count_everything(text: str, head_dim: int, bits: float) -> None:
    spec, shape = parse_spec(text), CacheShape(1, 2**17, 4, 2, head_dim, 4 * head_dim, jnp.bfloat16)
    assert spec.bits_asymptotic(shape) == bits
    exact = 16 * (spec.residual_length + spec.sink) / shape.max_len
    assert 8 * spec.nbytes(shape) / (shape.max_len * shape.elements_per_token) == pytest.approx(bits + exact)


def test_kernels_leave_gains_to_xla() -> None:
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if a.dtype == np.float64 else a, tree)  # noqa: E731
    with jax.enable_x64(True):
        chunk = single(make_chunk(16, 0 * ENDS, ENDS // ENDS, 1))
    cache = parse_spec("kvarn4v2(residual=8)").init(dataclasses.replace(SHAPE, dtype=jnp.float32))
    with fresh_reasons(), using(packed_attention=("native", "xla")):
        jax.eval_shape(lambda cache, chunk: cache.attend(chunk, ())[0], cache, chunk)
        found = {reason.text for reason in reasons() if reason.op == "packed_attention"}
    assert found == {"gains of tokens or channels; kernels read scales and zero points alone"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kvarn4v2(residual=0)", "expected a positive multiple of 8"),
        ("kvarn4v2(residual=12)", "expected a multiple of 8"),
        ("k4v2@token(gain=norm)", "expected @kivi"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, says: str) -> None:
    with pytest.raises(KvjaxError, match=says):
        parse_spec(text).tensors(SHAPE)
