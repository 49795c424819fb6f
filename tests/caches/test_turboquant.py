"""TurboQuant against its formula, and against the errors that its levels have on normal numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import make_chunk, rotated, tokens

from kvjax.caches.base import CacheShape, ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.caches.turboquant import LevelRows
from kvjax.ops.dispatch import fresh_reasons, reasons, using
from kvjax.quant import affine
from kvjax.quant.basis import hadamard
from kvjax.quant.normal import lloyd_max
from kvjax.testing.layers import BATCH, ENDS, HEADS, KV_HEADS, TOKENS, quick_jit

ROWS = np.random.default_rng(0).standard_normal((2000, 128))


def read_back(bits: int, levels: str, x: np.ndarray = ROWS) -> np.ndarray:
    """Rows to codes and back, with each kind of levels."""
    if levels == "lloyd":
        form = LevelRows(bits, x.shape[-1])
        return np.asarray(form.decode(form.encode(jnp.asarray(x)), jnp.float32))
    q = affine.quantize(jnp.asarray(x), bits, -1, x.shape[-1], fit="normal")
    return np.asarray(affine.dequantize(q, -1, x.shape[-1], jnp.float32))


@pytest.mark.parametrize(
    ("levels", "bits", "error"),
    [
        *(("lloyd", bits, error) for bits, error in ((2, 0.1175), (3, 0.03454), (4, 0.009497))),
        *(("uniform", bits, error) for bits, error in ((2, 0.1188), (3, 0.03744), (4, 0.01154))),
    ],
)
def test_errors_on_normal_rows(levels: str, bits: int, error: float) -> None:
    """Levels that are means have E[x q] = E[q^2] = 1 - error. Made as long as x, they err by 2 - 2 sqrt(that).

    The tolerance is for rows of 128 channels, whose tails are a little shorter than those of normal numbers.
    """
    found = read_back(bits, levels)
    np.testing.assert_allclose(*(np.linalg.norm(rows, axis=-1) for rows in (found, ROWS)), rtol=2e-3)
    assert np.square(found - ROWS).mean() == pytest.approx(2 - 2 * np.sqrt(1 - error), rel=0.06)


@pytest.mark.parametrize("levels", ["lloyd", "uniform"])
def test_sizes_scale_and_nothing_stays_nothing(levels: str) -> None:
    np.testing.assert_array_equal(read_back(3, levels, 4 * ROWS), 4 * read_back(3, levels))
    assert not read_back(3, levels, np.zeros((1, 128))).any()


def test_selections_find_the_levels() -> None:
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(LevelRows(4, 16)._levels_of(codes, jnp.float32), lloyd_max(4).astype(np.float32))


def test_keys_come_back_as_long_as_they_were() -> None:
    """H (|k| c / |c|), c the levels nearest to the channels of sqrt(d) H k / |k| (the form of vLLM)."""
    everything = np.full(BATCH, TOKENS)
    with jax.enable_x64(True):
        spec, shape = parse_spec("tq3v4"), CacheShape(BATCH, TOKENS, HEADS, KV_HEADS, 16, 64, jnp.float64)
        chunk = make_chunk(16, 0 * everything, everything, TOKENS)
        k, *_ = quick_jit(lambda cache, chunk: cache.materialize(chunk, ()))(spec.init(shape), chunk)
    keys = rotated(tokens(16)[1][0], np.arange(TOKENS))
    length = np.linalg.norm(keys, axis=-1, keepdims=True)
    levels = lloyd_max(3)
    c = levels[np.abs((4 * keys / length @ hadamard(16))[..., None] - levels).argmin(-1)]
    wanted = length * c / np.linalg.norm(c, axis=-1, keepdims=True) @ hadamard(16)
    np.testing.assert_allclose(k[0, :TOKENS], wanted, atol=1e-3 * length.max())


@pytest.mark.parametrize(
    ("text", "head_dim", "bits"),
    [("tq4v4", 128, 4.1875), ("tq3v3", 128, 3.1875), ("tq4v4", 64, 4.375), ("tq4v4(levels=uniform)", 128, 4.25)],
)
def test_bits_count_everything(text: str, head_dim: int, bits: float) -> None:
    plan = CachePlan.parse(text, ModelSizes(1, 4, 2, head_dim, 4 * head_dim))
    shape = CacheShape(1, 1024, 4, 2, head_dim, 4 * head_dim, jnp.bfloat16)
    (spec,) = plan.specs
    assert spec.bits_asymptotic(shape) == 8 * spec.nbytes(shape) / (1024 * shape.elements_per_token) == bits


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tq4v4", ["LevelRows; kernels read the packed layout, of a width that is known"]),
        ("tq4v4(levels=uniform)", []),
    ],
)
def test_kernels_read_uniform_levels(text: str, says: list[str]) -> None:
    spec, shape = parse_spec(text), CacheShape(BATCH, TOKENS + 1, HEADS, KV_HEADS, 64, 64, jnp.float32)
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if a.dtype == np.float64 else a, tree)  # noqa: E731
    with jax.enable_x64(True):
        first, last = (single(make_chunk(64, *at)) for at in ((0 * ENDS, ENDS, TOKENS), (ENDS, ENDS // ENDS, 1)))
    cache = quick_jit(lambda chunk: spec.init(shape).attend(chunk, ())[1])(first)
    outputs = []
    for names in (("xla",), ("native", "xla")):
        with fresh_reasons(), using(packed_attention=names):
            outputs.append(np.asarray(quick_jit(lambda cache, chunk: cache.attend(chunk, ())[0])(cache, last)))
            found = [reason.text for reason in reasons() if reason.op == "packed_attention"]
    assert found == says
    np.testing.assert_allclose(*outputs, atol=2e-4 * np.abs(outputs[0]).max())
