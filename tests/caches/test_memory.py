"""What the compiled decode step of a model allocates: one cache, donated, and a small workspace."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape, KVWeights
from kvjax.caches.plan import CachePlan
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

MAX_LEN = 8192
KIB = 2**10


@functools.cache
def decode_step(text, layers, max_len=MAX_LEN, window=None):
    """The memory of one compiled step of one token (3 kv heads, head_dim 64, float32), and the cache's bytes."""
    config = ModelConfig("llama", 64, 64, 64, layers, 9, 3, 64, max_len, window=window)
    shape = CacheShape.of(config, batch=1, max_len=max_len, dtype=jnp.float32)
    plan, decoder = CachePlan.parse(text, config), Decoder(config)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda: plan.init(shape))
    dense = jax.eval_shape(lambda: CachePlan.parse("dense", config).init(shape))
    params = jax.eval_shape(decoder.init, jax.random.key(0), token, dense)
    rng = np.random.default_rng(0)
    weights = KVWeights(*rng.standard_normal((2, 192, 64)), norm_eps=1e-6, head_dim=64)
    moments = {"unit": np.eye(64), "gained_delta": np.eye(64), "gradient": np.eye(384)}
    learned = [SimpleNamespace(gain=np.ones(64), delta=None, **moments)] if plan.calibrated else []
    bases = [jax.tree.map(jnp.float32, spec.bases(weights, np.ones(64), *learned)) for spec in plan.specs]

    def step(params, token, cache, bases):
        return decoder.apply(params, token, cache, bases=bases)

    program = jax.jit(step, donate_argnums=2).lower(params, token, cache, bases)
    return program.compile().memory_analysis(), plan.nbytes(max_len, 1, jnp.float32)


@pytest.mark.parametrize("text", ["dense", "k8v8@token", "k4v4@token", "k4v4@kivi", "k2v2@kivi(fit=mse)"])
def test_one_cache_and_a_small_workspace(text):
    # Of one layer XLA shares more than of neighbours: two are the first to count from.
    (memory, cache), (deeper, more) = decode_step(text, 2), decode_step(text, 3)
    length = 4
    assert memory.alias_size_in_bytes == cache + length  # updated in place
    one_dense_layer = 2 * MAX_LEN * 3 * 64 * 4
    assert memory.temp_size_in_bytes < one_dense_layer / 10  # 0.4 % of a model of 30 layers
    assert 2 * more == 3 * cache
    assert deeper.temp_size_in_bytes - memory.temp_size_in_bytes <= 32 * KIB  # at most one residual's copy a layer


@pytest.mark.parametrize("text", ["k8v8@token", "k4v4@kivi"])
def test_workspace_does_not_grow_with_the_history(text):
    short, long = (decode_step(text, 1, max_len)[0] for max_len in (MAX_LEN, 2 * MAX_LEN))
    assert long.temp_size_in_bytes - short.temp_size_in_bytes <= KIB
    assert long.alias_size_in_bytes > 1.9 * short.alias_size_in_bytes


@pytest.mark.parametrize("text", ["dense", "k4v4@kivi(sink=4)"])
def test_window_layers_hold_a_window(text):
    (memory, cache), (longer, more) = (decode_step(text, 1, max_len, 512) for max_len in (MAX_LEN, 16 * MAX_LEN))
    length = 4
    assert memory.alias_size_in_bytes == longer.alias_size_in_bytes == cache + length  # updated in place
    assert more == cache <= 2 * 3 * 64 * 4 * (512 + 32)
    assert longer.temp_size_in_bytes - memory.temp_size_in_bytes <= KIB


ROPE_TABLE = MAX_LEN * 64 * 2 * 4  # cos and sin of every position, for keys that are rebuilt; one for all layers


@pytest.mark.parametrize("text", ["x4@input", "x4@latent", "x4@head"])
def test_keys_and_values_are_never_rebuilt_whole(text):
    memory, cache = decode_step(text, 1)
    assert memory.alias_size_in_bytes == cache + 4  # updated in place
    one_dense_tensor = MAX_LEN * 3 * 64 * 4
    assert memory.temp_size_in_bytes - ROPE_TABLE < one_dense_tensor / 4
    assert decode_step(text, 2)[0].temp_size_in_bytes - memory.temp_size_in_bytes <= 512 * KIB  # weights, rearranged


GAINED = "xcl2@latent(base=0,per=channel,sink=4,fold=1,basis=balanced,gain=1)"


@pytest.mark.parametrize("text", ["xcl3@latent(base=0)", "xcl2@input(base=0,per=channel,sink=4)", GAINED])
def test_one_accumulator_for_all_layers(text):
    """The cache is updated in place, and the reconstruction runs through the layers in one buffer."""
    accumulator = MAX_LEN * 64 * 4
    (shallow, cache), (deep, more) = decode_step(text, 2), decode_step(text, 5)
    assert shallow.alias_size_in_bytes == cache + 4 and deep.alias_size_in_bytes == more + 4
    assert accumulator <= deep.temp_size_in_bytes - ROPE_TABLE < 2 * accumulator
    assert (
        deep.temp_size_in_bytes - shallow.temp_size_in_bytes < accumulator / 2
    )  # weights, rearranged; three more accumulators would be 3
