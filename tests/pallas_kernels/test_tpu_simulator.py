"""The TPU kernels in Pallas' simulator of a TPU: memory that nobody wrote is NaN, and races are found."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, packed, values
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.packed_attention import packed_attention
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.remat_attention import remat_attention
from pallas_kernels.remat_attention.weights import Rebuild

STRICT = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="simulated on CPU")


def both(op, *args, **settings):
    found = op(*args, **settings, implementation="mosaic_tpu", interpret=STRICT)
    assert not simulator.races.races_found
    reference = jax.jit(functools.partial(op, **settings, implementation="reference"), compiler_options=QUICK)
    return zip(jax.tree.leaves(found), jax.tree.leaves(reference(*args)), strict=True)


@pytest.mark.parametrize(("key_bits", "value_bits", "per"), [(4, 2, "channel"), (3, 8, "token")])
def test_packed_attention(key_bits: int, value_bits: int, per: str) -> None:
    keys = packed(values(1, 2, 1, 96, 64), key_bits, per, 32, 32)
    own = packed(values(2, 2, 1, 96, 64), value_bits, "token", 32, 32)
    stop = jnp.asarray([95, 1], jnp.int32)
    for found, wanted in both(packed_attention, values(3, 2, 1, 2, 64), keys, own, stop - 1, stop):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_remat_attention() -> None:
    rows = packed(values(1, 2, 1, 96, 64), 4, "channel", 32, 32)
    angle = np.outer(np.arange(96), 10000.0 ** -np.tile(np.linspace(0, 1, 32), 2))
    rebuild = Rebuild(values(3, 1, 64, 64) / 8, *(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)))
    stop = jnp.asarray([95, 1], jnp.int32)
    for found, wanted in both(remat_attention, values(6, 2, 1, 2, 64), rows, rows, rebuild, stop - 1, stop):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_quantize_pack() -> None:
    x, counted = values(1, 2, 1, 32, 64), jnp.ones((2, 32), bool)
    for found, wanted in both(quantize_pack, x, counted, bits=3, per="channel", group=32):
        np.testing.assert_array_equal(found, wanted)
