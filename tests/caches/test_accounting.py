"""The KV column of XQuant's tables 1 and 4: cache size over a 16-bit KV cache, for the models' true shapes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.models.config import ModelConfig
from kvjax.models.zoo import RANDOM

MHA, GQA = RANDOM["random:llama-2-7b"], RANDOM["random:llama-3.1-8b"]


@pytest.mark.parametrize(
    ("config", "text", "share"),
    [
        (MHA, "x8", 0.258),  # table 1
        (MHA, "x4", 0.133),
        (MHA, "x3", 0.102),
        (MHA, "x2", 0.070),
        (MHA, "k4v4@kivi(group=128)", 0.266),
        (GQA, "x4", 0.266),
        (GQA, "x3", 0.203),
        (GQA, "x2", 0.141),
        (GQA, "x2@head", 0.141),
        (MHA, "xcl4", 0.133),  # table 4: layers 0-2 in 4 bits
        (MHA, "xcl3", 0.1045),
        (MHA, "xcl2", 0.0762),
        (MHA, "0-2:x4;3-31:x2", 0.0762),
        (GQA, "xcl4", 0.266),
        (GQA, "xcl3", 0.2090),
        (GQA, "xcl2", 0.1523),
    ],
)
def test_the_papers_column(config: ModelConfig, text: str, share: float) -> None:
    plan = CachePlan.parse(text, config)
    assert plan.bits_asymptotic / 16 == pytest.approx(share, abs=5e-4)
    assert plan.bits_real(2**20) == pytest.approx(plan.bits_asymptotic, rel=2e-3)


@pytest.mark.parametrize(
    "text", ["x4", "x2@latent", "x3@head", "xcl2", "xcl3(per=channel,sink=4)", "x4@latent(outlier=1)"]
)
def test_bytes_are_the_compilers(text: str) -> None:
    """The formula's bytes, the leaves' bytes and the bytes of a compiled program's argument."""
    config = dataclasses.replace(GQA, layers=4, model_dim=256, heads=4, kv_heads=2, head_dim=64)
    plan, shape = CachePlan.parse(text, config), CacheShape.of(config, 2, 256, jnp.float32)
    cache = plan.init(shape)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) == plan.nbytes(256, 2, jnp.float32)
    compiled = jax.jit(lambda cache: jax.tree.map(lambda a: a + 1, cache)).lower(cache).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == plan.nbytes(256, 2, jnp.float32) + cache.length.nbytes


@pytest.mark.parametrize("text,extra", [("dense", 0), ("x4", 0), ("xcl4", 1), ("0-15:xcl4;16-31:x4", 1)])
def test_peak_bits_hold_the_accumulator(text: str, extra: float) -> None:
    """4096 channels of 16 bits once, over 2 x 1024 elements in each of 32 layers: one bit an element."""
    plan = CachePlan.parse(text, GQA)
    assert plan.bits_peak(1024, 2) - plan.bits_real(1024, 2) == pytest.approx(extra)
