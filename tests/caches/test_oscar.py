"""OSCAR: what its rotations do to the moments that they are learned from, what clips clip, and what it costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import make_chunk

from kvjax.caches.base import CacheShape
from kvjax.caches.oscar import clipped, oscar_rotation
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.ops.dispatch import fresh_reasons, reasons, using
from kvjax.quant import affine
from kvjax.quant.basis import block_hadamard
from kvjax.testing.layers import BATCH, ENDS, HEADS, KV_HEADS, TOKENS, quick_jit, stack


def moment(size: int) -> np.ndarray:
    """Of rows some channels of which are much larger than others."""
    rng = np.random.default_rng(size)
    rows = rng.standard_normal((400, size)) @ rng.standard_normal((size, size)) * np.geomspace(0.1, 10, size)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize(("size", "block"), [(64, 64), (80, 16)])
def test_a_rotation_spreads_the_moment_evenly(size: int, block: int) -> None:
    target = moment(size)
    turned = oscar_rotation(target)
    np.testing.assert_allclose(turned.T @ turned, np.eye(size), atol=1e-12)
    spread = np.diag(turned.T @ target @ turned).reshape(-1, block)
    np.testing.assert_allclose(spread, np.broadcast_to(spread.mean(1, keepdims=True), spread.shape))


def test_the_order_of_channels() -> None:
    target = np.diag([8.0, 1, 7, 2, 6, 3, 5, 4])
    values, vectors = np.linalg.eigh(target)
    assert (np.diff(values) > 0).all()
    # The i-th largest of 8 eigenvalues goes to place 0, 4, 2, 6, 1, 5, 3, 7; the largest one has column 7.
    order = [7, 3, 5, 1, 6, 2, 4, 0]
    np.testing.assert_allclose(oscar_rotation(target), (vectors @ block_hadamard(8))[:, order])


def test_rotations_are_learned_from_all_heads_of_queries_and_of_weighted_values() -> None:
    layer = stack()[0]
    seen = np.stack([moment(16), moment(16)[::-1, ::-1]])
    statistics = dataclasses.replace(layer.statistics, seen_value=seen)
    bases = parse_spec("oscar2").bases(layer.weights, layer.norm, statistics)
    for turned, target in zip(bases, (statistics.query, seen), strict=True):
        spread = np.diag(turned.T @ target.mean(0) @ turned)
        np.testing.assert_allclose(spread, spread.mean())
        assert np.ptp(np.diag(turned.T @ target[0] @ turned)) > 1e-3 * spread.mean()


@pytest.mark.parametrize(("part", "count"), [(0.96, 5), (0.92, 10), (1.0, 0)])
def test_clips(part: float, count: int) -> None:
    x = np.random.default_rng(0).standard_normal((7, 128))
    found = np.asarray(clipped(jnp.asarray(x), part))
    changed = np.abs(found - x) > 1e-6
    assert (changed.sum(-1) == count).all()
    for row, kept, moved in zip(x, found, changed, strict=True):
        assert np.abs(row[moved]).min(initial=np.inf) > np.abs(row[~moved]).max()
        np.testing.assert_allclose(np.abs(kept[moved]), np.abs(row[~moved]).max(), rtol=1e-6)
        assert (np.sign(kept) == np.sign(row)).all()


@pytest.mark.parametrize(
    ("part", "errors"),
    [(1.0, (0.252, 0.046, 0.0100)), (0.96, (0.157, 0.037, 0.0158)), (0.92, (0.128, 0.043, 0.0278))],
)
def test_errors_on_normal_rows(part: float, errors: tuple[float, ...]) -> None:
    """Of normal channels, 128 to a group: clips help at 2 bits and hurt at 4."""
    x = np.random.default_rng(1).standard_normal((4000, 128))
    kept = clipped(jnp.asarray(x), part)
    for bits, error in zip((2, 3, 4), errors, strict=True):
        back = affine.dequantize(affine.quantize(kept, bits, -1, 128), -1, 128, jnp.float32)
        assert np.square(np.asarray(back) - x).mean() == pytest.approx(error, rel=0.03)


def chunk_of(at: np.ndarray, lengths: np.ndarray, width: int, head_dim: int = 16):
    """With rotations of their own for keys and values."""
    matrices = [oscar_rotation(moment(head_dim)), oscar_rotation(moment(head_dim)[::-1])]
    return make_chunk(head_dim, at, lengths, width).replace(bases=[jnp.asarray(a) for a in matrices])


def shape_of(head_dim: int, dtype=jnp.float64) -> CacheShape:
    return CacheShape(BATCH, TOKENS + 1, HEADS, KV_HEADS, head_dim, 64, dtype)


def test_undone_exactly() -> None:
    attend = quick_jit(lambda cache, chunk: cache.attend(chunk, ())[0])
    with jax.enable_x64(True):
        chunk = chunk_of(0 * ENDS, ENDS, TOKENS)
        texts = "k16v16@token", "oscar16(residual=0,sink=3,clip_keys=1.0,clip_values=1.0)"
        wanted, found = (np.asarray(attend(parse_spec(text).init(shape_of(16)), chunk)) for text in texts)
    real = np.arange(TOKENS) < ENDS[:, None]
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-10)


def test_kernels_read_it() -> None:
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if a.dtype == np.float64 else a, tree)  # noqa: E731
    with jax.enable_x64(True):
        first, last = (single(chunk_of(*at, 64)) for at in ((0 * ENDS, ENDS, TOKENS), (ENDS, ENDS // ENDS, 1)))
    spec = parse_spec("oscar2(residual=0,sink=3)")
    cache = quick_jit(lambda chunk: spec.init(shape_of(64, jnp.float32)).attend(chunk, ())[1])(first)
    outputs = []
    for name in ("xla", "native"):
        with fresh_reasons(), using(packed_attention=name):
            outputs.append(np.asarray(quick_jit(lambda cache, chunk: cache.attend(chunk, ())[0])(cache, last)))
            assert not [reason for reason in reasons() if reason.op == "packed_attention"]
    np.testing.assert_allclose(*outputs, atol=2e-4 * np.abs(outputs[0]).max())


@pytest.mark.parametrize(("head_dim", "bits", "at_128k"), [(128, 2.25, 2.284), (64, 2.5, 2.533)])
def test_bits_count_everything(head_dim: int, bits: float, at_128k: float) -> None:
    """The second figure is of 64 and 256 exact tokens in place of codes; here they have codes as well."""
    spec, shape = parse_spec("oscar2"), CacheShape(1, 2**17, 4, 2, head_dim, 4 * head_dim, jnp.bfloat16)
    assert spec.bits_asymptotic(shape) == bits
    real = 8 * spec.nbytes(shape) / (shape.max_len * shape.elements_per_token)
    assert real == pytest.approx(at_128k + bits * 320 / 2**17, abs=5e-4)


def test_groups_have_at_most_128_channels() -> None:
    (keys, _) = parse_spec("oscar2").tensors(CacheShape(1, 8, 4, 2, 256, 64))
    assert keys.format.group == 128


@pytest.mark.parametrize("field", ["clip_keys=0.0", "clip_values=1.5"])
def test_parts_are_checked(field: str) -> None:
    with pytest.raises(KvjaxError, match="expected a part above 0, at most 1"):
        parse_spec(f"oscar2({field})")
