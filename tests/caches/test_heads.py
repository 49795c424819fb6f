"""A pair of widths for each kv head: every head is what it is in a cache of its own pair."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from oracle import make_chunk, model

from kvjax.caches.base import CacheShape, ModelSizes
from kvjax.caches.heads import PerHead
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.testing.layers import BATCH, HEADS, KV_HEADS, TOKENS, both, schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEAD_DIM, WIDTH = 16, 7
MODEL = model(2)  # two kv heads


@functools.cache
def outputs(text: str) -> np.ndarray:
    """What every query reads [n, H, d], fed in ragged chunks."""
    with jax.enable_x64(True):
        spec = parse_spec(text)
        cache = spec.init(CacheShape(BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM, 64, jnp.float64))
        found = []
        for at, lengths in schedule(WIDTH):
            output, _, cache, *_ = both(cache, make_chunk(HEAD_DIM, at, lengths, WIDTH), ())
            found.append(np.asarray(output)[np.arange(WIDTH) < lengths[:, None]])
        return np.concatenate(found)


@pytest.mark.parametrize("suffix", ["@kivi(group=8,sink=3)", "@token(fit=mse,rotate=hadamard)"])
def test_a_head_reads_what_its_pair_alone_reads(suffix: str) -> None:
    each = outputs(f"k4v2{suffix}"), outputs(f"k2v8{suffix}")
    found, shared = outputs(f"k4v2/k2v8{suffix}"), HEADS // KV_HEADS
    for head, alone in enumerate(each):
        mine = slice(head * shared, (head + 1) * shared)
        np.testing.assert_allclose(found[:, mine], alone[:, mine], atol=1e-12)
        assert abs(found[:, mine] - each[1 - head][:, mine]).max() > 1e-2


def test_heads_of_one_pair_are_kept_together_in_any_order() -> None:
    spec = parse_spec("k4v2/k8v8/k4v2/k4v2@kivi(group=8)")
    assert spec.groups == ((0, 2, 3), (1,))
    shape = CacheShape(1, 64, 8, 4, HEAD_DIM, 64, jnp.float32)
    nbytes = 0
    for pair, heads in (("k4v2", 3), ("k8v8", 1)):
        part = CacheShape(1, 64, 2 * heads, heads, HEAD_DIM, 64, jnp.float32)
        nbytes += parse_spec(f"{pair}@kivi(group=8)").nbytes(part)
    assert spec.nbytes(shape) == nbytes


def test_figures_are_means_over_heads() -> None:
    plan = CachePlan.parse("0:k4v2/k8v8@token;1:k4v4@token", MODEL)
    assert plan.bits_nominal == pytest.approx((3 + 8 + 4 + 4) / 4)
    scales = 32 / 128
    assert plan.bits_asymptotic == pytest.approx((3 + 8 + 4 + 4) / 4 + scales)
    assert plan.coded_share(100) == 1.0


@pytest.mark.parametrize(
    ("text", "canonical", "short"),
    [
        ("k4v2/k8v8", "k4v2/k8v8@kivi", "k4v2/k8v8@kivi"),
        ("kr4v2/kr8v8", "k4v2/k8v8@kivi(sink=4,fit=unbiased,rotate=values)", "kr4v2/kr8v8"),
        ("k4v2/k8v8@token(sink=4)", "k4v2/k8v8@token(sink=4)", "k4v2/k8v8@token(sink=4)"),
    ],
)
def test_names(text: str, canonical: str, short: str) -> None:
    spec = parse_spec(text)
    assert (str(spec), spec.short_text) == (canonical, short)
    assert parse_spec(canonical) == parse_spec(short) == spec
    plan = CachePlan.parse(f"0:{text};1:k4v4", MODEL)
    assert CachePlan.parse(str(plan), MODEL) == plan


def test_equal_pairs_are_the_pair() -> None:
    assert CachePlan.parse("k4v2/k4v2", MODEL) == CachePlan.parse("k4v2", MODEL)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k4v2/k4v4/k8v8", "3 pairs; expected one for each of the 2 kv heads"),
        ("k4v2/x4", "expected a pair for each kv head, as in k8v4/k4v2@kivi"),
        ("k4v2/kr4v2", "expected pairs that differ in widths alone"),
        ("k4v2/k4v4(rotate=left)", "rotate=left; expected none, hadamard or values"),
        ("k4v2/k7v4", "key_bits=7"),
        ("a/b", "cache 'a/b' is not known"),
    ],
)
def test_other_names_are_refused(text: str, says: str) -> None:
    with pytest.raises(KvjaxError) as error:
        CachePlan.parse(text, MODEL)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("groups", [((0,),), ((0, 0), (1,)), ((0, 1, 2),)])
def test_every_head_is_in_one_group(groups) -> None:
    with pytest.raises(KvjaxError, match="expected each of the 2 kv heads once"):
        PerHead((KV(4, 2), KV(2, 4)), groups=groups)


def test_kvtuners_files_of_pairs_by_head(tmp_path) -> None:
    """As `per_head_config` of its public code: {layer: {kv head: {nbits_key, nbits_value}}}."""
    rows = {
        0: {0: {"nbits_key": 8, "nbits_value": 4}, 1: {"nbits_key": 4, "nbits_value": 2}},
        1: {"nbits_key": 4, "nbits_value": 4},
    }
    (tmp_path / "per_head.yaml").write_text(yaml.safe_dump(rows))
    plan = CachePlan.parse(f"{tmp_path}/per_head.yaml@token(sink=4)", MODEL)
    assert plan == CachePlan.parse("0:k8v4/k4v2@token(sink=4);1:k4v4@token(sink=4)", MODEL)
    assert yaml.safe_load(plan.preset()) == rows


@pytest.mark.parametrize(
    "text",
    [
        "{0: {0: {nbits_key: 4, nbits_value: 4}, 2: {nbits_key: 4, nbits_value: 4}}}",
        "{0: {0: {nbits_key: 4, nbits_value: 4}, 1: 4}}",
        "{0: {0: {nbits_key: 4, nbits_value: 4}, nbits_key: 4}}",
        "{0: {}}",
    ],
)
def test_malformed_files_of_pairs_by_head(tmp_path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(KvjaxError) as error:
        CachePlan.parse(f"{tmp_path}/bad.yaml", ModelSizes(1, 4, 2, 16, 64))
    assert "\n" not in str(error.value)
