"""The least time of a decode step: XQuant's own numbers, and figures counted by hand."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax.caches.base import KVWeights
from kvjax.evaluate.roofline import DEVICES, Device, Work, ridge_tokens, roofline, work
from kvjax.models.config import ModelConfig
from kvjax.models.params import layer_shapes
from kvjax.models.zoo import RANDOM

PAPER = Device("h100 pcie", 2e12, 756e12, 80e9)  # XQuant, section 3.4
GQA = ModelConfig("llama", 64, 64, 96, 4, 8, 2, 16, 4096)
MHA = dataclasses.replace(GQA, kv_heads=8, head_dim=8)
SLOW = Device("slow", 1.0, 1e30, 1e30)  # moves one byte a second and computes in no time


def test_the_papers_break_even_contexts() -> None:
    """Equations 3 and 4 with d = 4096, e = 2, g = 4: 2.3K and 40.6K tokens at 378 operations per byte."""
    d, e, latent = 4096, 2, 4096 / 4
    assert PAPER.ridge == 378
    mha = ridge_tokens(PAPER.ridge, 2 * 12 * d**2, 4 * d**2, e / 8 * d)
    gqa = ridge_tokens(PAPER.ridge, 2 * 13 * d**2 + 2 * 2 * latent**2, 4 * latent**2, e / 8 * latent)
    assert (round(mha, -2), round(gqa, -2)) == (2300, 40600)


def test_a_token_that_computes_little_is_never_bound_by_computing() -> None:
    assert ridge_tokens(100, 1e9, 99, 1) == math.inf
    assert ridge_tokens(100, 0, 101, 1) == 0
    at = ridge_tokens(100, 1e6, 300, 2, weight_flops=1e7)  # 1e7 + 300 l = 100 (1e6 + 2 l)
    assert 1e7 + 300 * at == pytest.approx(100 * (1e6 + 2 * at))


def test_keys_are_rebuilt_and_values_are_not() -> None:
    """So @input of an MHA model computes half of equation 3's remat, and sums of X in place of values."""
    model = RANDOM["random:llama-2-7b"]
    step = roofline(model, PAPER, "x2@input", contexts=2**20)[0]
    attention = 2 * 32 * (128 + 4096)
    weights = sum(math.prod(shape) for shape in layer_shapes(model).values())
    token = 2 * 4096**2 + attention
    assert step.flops - 2 * 32 * weights - 2 * 32000 * 4096 == 32 * 2**20 * token
    expected = ridge_tokens(378, 2 * weights, token, 2.25 / 8 * 4096, 2 * weights)
    assert step.ridge_tokens == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k4v2@kivi", Work(0, 0, 16)),
        ("x4@input", Work(0, 64 * 32, 64)),
        ("x4@latent(group=32)", Work(2 * (64 * 32 + 32 * 32), 32 * 32, 32)),
        ("x4@head(group=8)", Work(2 * (64 * 32 + 2 * 16 * 16), 2 * 16 * 16, 16)),
        ("xcl3@latent(base=0)", Work(64 * 64, 64 * 64 + 64 * 32, 64)),
        ("xcl3@input(base=0)", Work(0, 64 * 32, 64)),
        ("xcl3@input(base=0,rotate=1)", Work(64 * 64, 64 * 64 + 64 * 32, 64)),
    ],
)
def test_the_work_of_methods_is_that_of_their_bases(name: str, expected: Work) -> None:
    """Matrices by hand; those of bases also as a method makes them."""
    spec = kvjax.CachePlan.parse(name, GQA).specs[-1]
    assert work(spec, GQA) == expected
    k, v = jnp.ones((2, 32, 64), jnp.float32)
    bases = spec.bases(KVWeights(k, v, head_dim=16), jnp.ones(64)) if spec.bases_key else []
    assert sum(leaf.size for leaf in jax.tree.leaves(bases)) == expected.bases


@pytest.mark.parametrize("model", [GQA, MHA])
@pytest.mark.parametrize("name", ["dense", "k4v4@token", "x4", "xcl3(base=1)"])
def test_bytes_are_the_allocated_ones_and_the_accumulator_moves_twice(model: ModelConfig, name: str) -> None:
    plan = kvjax.CachePlan.parse(name, model)
    short, long = roofline(model, SLOW, plan, contexts=(256, 512), batch=3)
    accumulator = 2 * 2 * 3 * 512 * 64 * model.layers if name.startswith("xcl") else 0
    assert long.cache_bytes == plan.nbytes(512, 3) + accumulator
    assert long.seconds == long.weight_bytes + long.cache_bytes  # a byte a second
    assert (long.computing, long.ridge_tokens) == (0, math.inf)
    assert long.weight_bytes == short.weight_bytes
    elements = 3 * 512 * model.layers * 2 * model.kv_heads * model.head_dim
    held = plan.bits_peak(512, 3) / 8 * elements
    assert long.held_bytes - roofline(model, SLOW, "dense", contexts=512, batch=3)[0].held_bytes == pytest.approx(
        held - 2 * elements + 2 * sum(work(spec, model).bases for spec in plan.specs)
    )


def test_a_layer_takes_the_longer_of_moving_and_computing() -> None:
    """As many operations a second as bytes: attention over few bytes is bound by computing, weights never are."""
    even = Device("even", 1.0, 2.0, 1e30)
    step = roofline(GQA, even, "k2v2@token", contexts=65536)[0]
    head = 2 * 64 * 64
    assert step.seconds == pytest.approx((step.flops - 2 * 64 * 64) / 2 + head)
    assert step.computing == pytest.approx(1 - head / step.seconds)


def test_a_window_bounds_what_is_read() -> None:
    model = dataclasses.replace(GQA, window=128, full_layers=(3,))
    near, far = roofline(model, SLOW, "k4v4@token", contexts=(1024, 2048))
    one = kvjax.CachePlan.parse("k4v4@token", GQA)  # whose layers are all alike
    assert near.cache_bytes == (3 * one.nbytes(128) + one.nbytes(1024)) / 4
    assert far.cache_bytes - near.cache_bytes == (one.nbytes(2048) - one.nbytes(1024)) / 4


def test_experts_that_are_not_chosen_are_not_read() -> None:
    model = dataclasses.replace(GQA, experts=8, experts_per_token=2)
    one, all_of_them = (roofline(model, SLOW, contexts=64, batch=batch)[0] for batch in (1, 10_000))
    assert all_of_them.weight_bytes - one.weight_bytes == pytest.approx(2 * 4 * 6 * 3 * 64 * 96)


def test_the_fastest_that_fits_is_marked() -> None:
    small = dataclasses.replace(DEVICES["h100"], memory=1.3e6)
    steps = roofline(GQA, small, "dense,k8v8@token,k4v4@token", contexts=(64, 4096))
    assert [step.fits for step in steps] == [True, False, True, False, True, True]
    assert str(steps.fastest(64).cache) == "k4v4@token"
    lines = [line.split() for line in steps.table().splitlines()]
    assert lines[0][:3] == ["cache", "64", "4,096"]
    assert lines[1][2].startswith("(") and lines[3][2].startswith("*") and lines[3][3] == "never"
    fits = roofline(GQA, small, "k4v4@token", contexts=math.floor(steps[-1].room))[0]
    assert fits.held_bytes == pytest.approx(1.3e6, rel=0.01)


def test_a_name_needs_no_weights_and_bad_arguments_say_what_was_expected() -> None:
    assert kvjax.roofline("random:llama-3.1-70b", "b200", contexts=1024)[0].weight_bytes > 130e9
    for arguments, says in (
        ({"device": "tpu"}, "device 'tpu'; expected one of v5e, v6e"),
        ({"contexts": 0}, "context=0; expected at least 1"),
        ({"contexts": []}, "no caches or no contexts"),
        ({"batch": 0}, "batch=0; expected at least 1"),
        ({"caches": "k9v9"}, "k9v9"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=says):
            kvjax.roofline(GQA, **arguments)
