"""What the compiled decode step of a model allocates: one cache, donated, and a small workspace."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

MAX_LEN = 8192
KIB = 2**10


@functools.cache
def decode_step(text, layers, max_len=MAX_LEN):
    """The memory of one compiled step of one token (3 kv heads, head_dim 64, float32), and the cache's bytes."""
    config = ModelConfig("llama", 64, 64, 64, layers, 9, 3, 64, max_len)
    shape = CacheShape.of(config, batch=1, max_len=max_len, dtype=jnp.float32)
    plan, decoder = CachePlan.parse(text, config), Decoder(config)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda: plan.init(shape))
    params = jax.eval_shape(decoder.init, jax.random.key(0), token, cache)
    step = jax.jit(decoder.apply, donate_argnums=2)
    return step.lower(params, token, cache).compile().memory_analysis(), plan.nbytes(shape)


@pytest.mark.parametrize("text", ["dense", "k8v8@token", "k4v4@token", "k4v4@kivi", "k2v2@kivi"])
def test_one_cache_and_a_small_workspace(text):
    memory, cache = decode_step(text, 1)
    length = 4
    assert memory.alias_size_in_bytes == cache + length  # updated in place
    one_dense_layer = 2 * MAX_LEN * 3 * 64 * 4
    assert memory.temp_size_in_bytes < one_dense_layer / 10  # 0.4 % of a model of 30 layers
    deeper, more = decode_step(text, 2)
    assert more == 2 * cache
    assert deeper.temp_size_in_bytes - memory.temp_size_in_bytes <= 32 * KIB  # shared by the layers


@pytest.mark.parametrize("text", ["k8v8@token", "k4v4@kivi"])
def test_workspace_does_not_grow_with_the_history(text):
    short, long = (decode_step(text, 1, max_len)[0] for max_len in (MAX_LEN, 2 * MAX_LEN))
    assert long.temp_size_in_bytes - short.temp_size_in_bytes <= KIB
    assert long.alias_size_in_bytes > 1.9 * short.alias_size_in_bytes
