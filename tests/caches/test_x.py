"""Caches that store the layer input: attend equals attention over materialize, and both the oracle.

A stack of layers with weights and inputs of their own (a random walk, like a residual stream) is fed ragged chunks;
the oracle keeps every X, quantises what is flushed as the paper says, and knows nothing of packing or accumulators.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import as_stored, rotated

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.caches.x import X
from kvjax.caches.xcl import XCL
from kvjax.errors import KvjaxError
from kvjax.ops import remat
from kvjax.quant.basis import rotation
from kvjax.testing.layers import (
    BATCH,
    CONFIG,
    DIM,
    ENDS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SHAPE,
    TOKENS,
    both,
    make_chunk,
    normalize,
    same_trees,
    schedule,
    stack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def plan_of(text: str) -> CachePlan:
    """Of all layers where they depend on one another, of one where they do not."""
    return CachePlan.parse(text, CONFIG if text.startswith("xcl") else dataclasses.replace(CONFIG, layers=1))


@functools.cache
def bases_of(text: str):
    pairs = zip(plan_of(text).specs, stack(), strict=False)
    learned = lambda spec, layer: [layer.statistics] if spec.calibrated else []  # noqa: E731
    return [spec.bases(layer.weights, layer.norm, *learned(spec, layer)) for spec, layer in pairs]


@functools.cache
def run(text: str, width: int, window=None, read="exact"):
    """(start, lengths, outputs, outputs over materialize per layer) of every chunk, and the last caches and carry."""
    with jax.enable_x64(True):
        plan, rows = plan_of(text), []
        caches = [spec.init(SHAPE) for spec in plan.specs]
        for at, lengths in schedule(width):
            carry, outputs = plan.init_carry(SHAPE), []
            for i, (layer, bases) in enumerate(zip(stack(), bases_of(text), strict=False)):
                chunk = make_chunk(layer, bases, at, lengths, width, window, read)
                output, plain, caches[i], other, carry, plain_carry = both(caches[i], chunk, carry)
                same_trees(caches[i], other, 1e-12)
                jax.tree.map(np.testing.assert_array_equal, carry, plain_carry)
                outputs.append((np.asarray(output), np.asarray(plain)))
            rows.append((at, lengths, outputs))
        return rows, caches, carry


# ---- the oracle, one sequence


def blocks_of(spec, before: int, end: int, read: str) -> list[tuple[int, int]]:
    r = spec.residual_length
    if r == 0:
        return [(i, i + 1) for i in range(end)]
    if read == "exact":
        return [(i, i + r) for i in range(0, before // r * r, r)]
    return [(i, min(i + r, end)) for i in range(0, end, r)]


def by_blocks(z, spec, blocks, bits, per, group):
    """z [n, G, W] with the blocks read back as they are stored, the rest exact."""
    out = z.copy()
    if per == "token" and blocks:
        blocks = [(0, blocks[-1][1])]  # each token by itself: all at once
    for start, stop in blocks:
        out[start:stop] = as_stored(z[start:stop], bits, per, group, np.arange(start, stop), spec.sink)
    return out


def seen_x(spec: X, layer, bases, b, before, end, read):
    x, blocks = layer.x[b, :end], blocks_of(spec, before, end, read)
    if spec.mode == "input":
        z = by_blocks(x[:, None], spec, blocks, spec.bits, "token", spec.group or 64)[:, 0]
        z[: spec.sink] = x[: spec.sink]
        return layer.kv(z)
    parts = []
    for (down, up), per in zip(bases, ("channel", "token"), strict=True):
        z = np.einsum("nd,gdr->ngr", x, down)
        width = z.shape[2]
        group = 64 if per == "channel" else width if spec.mode == "head" else min(64, width)
        stored = by_blocks(z, spec, blocks, spec.bits, per, spec.group or group)
        if per == "channel" and spec.outlier:
            stored[..., 0] = z[..., 0]
        stored[: spec.sink] = z[: spec.sink]
        parts.append(np.einsum("ngr,grm->ngm", stored, up).reshape(end, -1))
    k, v = parts[0] + layer.k_bias, parts[1] + layer.v_bias
    k, v = (a.reshape(end, KV_HEADS, HEAD_DIM) for a in (k, v))
    return normalize(k) * layer.k_norm, v


def seen_cl(specs: list[XCL], bases, layers, i, b, before, end, read):
    """X̂ of layer i through the run, closed loop: deltas of what is flushed, against X̂ of the layer below."""
    below = np.zeros((end, DIM))
    for j in range(i + 1):
        spec, layer, basis = specs[j], layers[j], bases[j][0] if bases[j] else np.eye(DIM)
        up, gain = bases[j][1] if spec.calibrated else basis.T, bases[j][2] if spec.gain else 1
        x = {"pre": layer.h, "post": layer.x}[spec.norm][b, :end]
        x = layer.unit[b, :end] if spec.fold else x
        prev = gain * below if j > spec.base else np.zeros_like(below)
        z = ((x - prev) @ basis)[:, None]
        bits = spec.bits if j > spec.base else spec.base_bits
        group = spec.group or 64
        stored = by_blocks(z, spec, blocks_of(spec, before, end, read), bits, spec.per, group)[:, 0]
        below = prev + stored @ up
    exact = np.ones(end, bool)
    for start, stop in blocks_of(spec, before, end, read):
        exact[start:stop] = False
    exact[: spec.sink] = True
    below[exact] = x[exact]
    if spec.norm == "pre":
        below = normalize(below) * layer.norm
    return layer.kv(below * layer.norm if spec.fold else below)


def expected(text, i, b, before, length, window, read):
    spec, layer, end = plan_of(text).specs[i], stack()[i], before + length
    if isinstance(spec, XCL):
        k, v = seen_cl(plan_of(text).specs, bases_of(text), stack(), i, b, before, end, read)
    else:
        k, v = seen_x(spec, layer, bases_of(text)[i], b, before, end, read)
    k = rotated(k, np.arange(end))
    k, v = (np.repeat(a, HEADS // KV_HEADS, 1) for a in (k, v))
    at, index = np.arange(before, end)[:, None], np.arange(end)
    visible = (index <= at) & (index > at - (window or TOKENS))
    scores = np.einsum("thd,nhd->thn", layer.q[b, before:end], k) / np.sqrt(HEAD_DIM)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("thn,nhd->thd", weights / weights.sum(-1, keepdims=True), v)


MATRIX = [
    "x4@input",
    "x3@input(group=16,residual=8,sink=3)",
    "x4@latent(group=16)",
    "x2@latent(group=16,sink=5,outlier=1)",
    "x4@latent(group=8,rotate=1)",
    "x16@latent",
    "x4@head(group=16)",
    "x3@latent(group=16,sink=5,rotate=1,basis=balanced)",
    "x2@head(group=8,residual=16,sink=3,outlier=1)",
    "xcl3@input",
    "xcl2@input(group=16,sink=3,base=1,base_bits=8,rotate=1)",
    "xcl3@input(norm=pre,base=0)",
    "xcl3@latent",
    "xcl2@latent(per=channel,group=16,fold=1,sink=4)",
    "xcl16@latent(base_bits=16)",
    "xcl2@latent(per=channel,group=16,fold=1,rotate=1,sink=4,basis=balanced,gain=1)",
    "xcl3@latent(fold=1,base=0,basis=balanced)",
    "xcl16@latent(base_bits=16,fold=1,gain=1)",
]
RUNS = [
    pytest.param((1, None, "exact"), marks=pytest.mark.weekly),  # decoding in chunks is held to it for every method
    (7, 20, "stored"),
    (TOKENS, None, "exact"),
]


@pytest.mark.parametrize("case", RUNS, ids=str)
@pytest.mark.parametrize("text", MATRIX)
def test_attend_is_attention_over_materialize(text: str, case: tuple) -> None:
    width, window, read = case
    rows, _, _ = run(text, width, window, read)
    for at, lengths, outputs in rows:
        for i, (output, plain) in enumerate(outputs):
            assert np.isfinite(output).all()
            for b, (start, length) in enumerate(zip(at, lengths, strict=True)):
                np.testing.assert_allclose(output[b, :length], plain[b, :length], atol=1e-11)
                if length:
                    wanted = expected(text, i, b, start, length, window, read)
                    np.testing.assert_allclose(output[b, :length], wanted, atol=1e-9, err_msg=f"layer {i}")


@pytest.mark.parametrize(
    "text", ["x4@input", "x4@latent(group=16)", "xcl3@latent", "xcl2@latent(per=channel,group=16,fold=1,sink=4)"]
)
def test_chunkings_leave_the_same_cache(text: str) -> None:
    (_, steps, _), (_, one_shot, _) = run(text, 1), run(text, TOKENS)
    for spec, a, b in zip(plan_of(text).specs, steps, one_shot, strict=True):
        same_trees(a.store.packed, b.store.packed, 1e-11)
        same_trees(a.store.sinks, b.store.sinks, 1e-11)
        for s, end in enumerate(ENDS):
            left = end % spec.residual_length if spec.residual_length else 0
            for mine, its in zip(a.store.residual, b.store.residual, strict=True):
                same_trees(mine[s, :left], its[s, :left], 1e-11)


def test_plain_forms_follow_the_model() -> None:
    mha = dataclasses.replace(CONFIG, kv_heads=HEADS)
    assert str(CachePlan.parse("x4", CONFIG)) == "x4@latent" and str(CachePlan.parse("x4", mha)) == "x4@input"
    assert str(CachePlan.parse("xcl3", CONFIG)) == "xcl3@latent" and str(CachePlan.parse("xcl3", mha)) == "xcl3@input"
    found = "xcl2@latent(sink=4,per=channel,fold=1,rotate=1,fit=mse)"
    assert CachePlan.parse("xclr2", CONFIG) == CachePlan.parse(found, CONFIG)
    assert CachePlan.parse("xclr2(fit=minmax)", CONFIG) == CachePlan.parse(found.replace(",fit=mse", ""), CONFIG)
    assert CachePlan.parse("xclr2(sink=0)", CONFIG) == CachePlan.parse(found.replace("sink=4,", ""), CONFIG)
    wide = dataclasses.replace(CONFIG, model_dim=384)
    assert (
        CachePlan.parse("x4", CONFIG).specs[0].residual_length == 64
        and CachePlan.parse("x4", wide).specs[0].residual_length == 128
    )


def test_a_run_has_its_own_base_and_bits_may_differ_in_it() -> None:
    deep = dataclasses.replace(CONFIG, layers=10)
    plan = CachePlan.parse("0-3:xcl3;4:k4v4;5-6:xcl3(base=0);7-9:xcl2(base=0)", deep)
    assert [getattr(spec, "delta", None) for spec in plan.specs] == [False] * 3 + [True, None, False] + [True] * 4
    assert [spec.bits_nominal for spec in plan.specs] == [4, 4, 4, 3, 4, 4, 3, 2, 2, 2]
    assert CachePlan.parse(str(plan), deep) == plan


def test_values_are_absorbed_only_for_few_queries_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "x4@latent(group=16)"
    few = run(text, 7)[0]
    monkeypatch.setattr(remat, "is_decode_shape", lambda rows: False)
    jax.clear_caches()
    many = run.__wrapped__(text, 7)[0]
    for (_, lengths, a), (_, _, b) in zip(few, many, strict=True):
        for (x, _), (y, _) in zip(a, b, strict=True):
            for s, length in enumerate(lengths):
                np.testing.assert_allclose(x[s, :length], y[s, :length], atol=1e-12)


def test_closed_loop_errors_do_not_add_up() -> None:
    """Also: the accumulator is the reconstruction of the last layer."""
    rng = np.random.default_rng(3)
    layers, width = 24, 32
    config = dataclasses.replace(CONFIG, layers=layers)
    shape = CacheShape.of(config, BATCH, width, jnp.float64)
    x = np.cumsum(rng.standard_normal((layers, BATCH, width, DIM)), 0)
    start, lengths = np.zeros(BATCH, int), np.full(BATCH, width)
    open_loop, state = [], np.zeros_like(x[0])
    closed_loop = []
    with jax.enable_x64(True):
        plan = CachePlan.parse("xcl3@input(base=0)", config)
        carry = plan.init_carry(shape)
        attend = jax.jit(lambda cache, chunk, carry: cache.attend(chunk, carry)[2])
        for i, spec in enumerate(plan.specs):
            chunk = make_chunk(stack()[0], (), start, lengths, width, None, "exact").replace(x=jnp.asarray(x[i]))
            carry = attend(spec.init(shape), chunk, carry)
            closed_loop.append(np.linalg.norm(np.asarray(carry["acc"]) - x[i]))
            step = (x[i] - x[i - 1] if i else x[0]).reshape(-1, 1, DIM)
            state = state + as_stored(step, 3 if i else 4, "token", 64, np.arange(len(step)), 0).reshape(state.shape)
            open_loop.append(np.linalg.norm(state - x[i]))
    np.testing.assert_allclose(closed_loop[0], open_loop[0])
    assert max(closed_loop[1:]) < 1.1 * min(closed_loop[1:])  # the error of one delta, whatever the depth
    assert open_loop[-1] > 4 * open_loop[1] and open_loop[-1] > 4 * closed_loop[-1]


def test_nothing_is_learned_from_nothing() -> None:
    for text, says in {
        "x4@head(basis=balanced)": "expected @latent",
        "xcl3@latent(gain=1)": "expected @latent and fold=1",
        "xcl3@input(fold=1,basis=balanced)": "expected @latent and fold=1",
    }.items():
        with pytest.raises(KvjaxError, match=says):
            plan_of(text)


def test_the_rotation_is_orthogonal() -> None:
    turn = rotation(48)
    np.testing.assert_allclose(turn @ turn.T, np.eye(48), atol=1e-12)
    np.testing.assert_array_equal(turn, rotation(48))
