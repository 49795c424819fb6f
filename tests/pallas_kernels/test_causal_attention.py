"""Causal attention of a chunk against plain float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, values

from pallas_kernels.causal_attention import IMPLEMENTATIONS, causal_attention

INTERPRET = jax.default_backend() == "cpu"
KERNELS = {"cpu": ("splash",), "tpu": ("splash",)}.get(jax.default_backend(), ())


def run(name: str, *tensors: Any, window: int | None = None) -> Any:
    interpret = INTERPRET and name != "reference"
    call = functools.partial(causal_attention, window=window, implementation=name, interpret=interpret)
    return jax.jit(call, compiler_options=QUICK)(*tensors)


def tensors(tokens: int, ratio: int, channels: int) -> list[jax.Array]:
    shapes = (2, tokens, 2 * ratio, channels), *[(2, tokens, 2, channels)] * 2
    return [values(i, *shape, dtype=jnp.bfloat16) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("tokens", "ratio", "channels", "window"), [(256, 1, 128, None), (130, 3, 64, None), (300, 2, 80, 40)]
)
def test_is_plain_attention(name: str, tokens: int, ratio: int, channels: int, window: int | None) -> None:
    given = tensors(tokens, ratio, channels)
    found, wanted = run(name, *given, window=window), run("reference", *given, window=window)
    for a, b, tolerance in zip(found, wanted, (0.02, 0.005), strict=True):  # an output has 8 bits of its own
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("name", [*KERNELS, "reference"])
@pytest.mark.parametrize("window", [None, 20])
def test_what_is_not_finite_spoils_only_those_that_see_it(name: str, window: int | None) -> None:
    q, k, v = tensors(140, 2, 64)
    k, v = k.at[0, 50, 0, 3].set(jnp.nan), v.at[1, 90, 1].set(jnp.inf)
    clean = run(name, q, *tensors(140, 2, 64)[1:], window=window)
    spoiled = np.zeros((2, 140, 4), bool)
    spoiled[0, 50 : 50 + (window or 140), :2] = spoiled[1, 90 : 90 + (window or 140), 2:] = True
    for a, b in zip(run(name, q, k, v, window=window), clean, strict=True):
        np.testing.assert_array_equal(np.isnan(a).reshape(2, 140, 4, -1).all(-1), spoiled)
        np.testing.assert_array_equal(a[~spoiled], b[~spoiled])


def test_refusals() -> None:
    q, k, v = tensors(8, 1, 16)
    with pytest.raises(NotImplementedError, match="queries in float32; splash attention multiplies in bfloat16"):
        causal_attention(*(a.astype(jnp.float32) for a in (q, k, v)), implementation="splash")
    for bad in ({"k": k[:, :4]}, {"k": k[:, :4], "v": v[:, :4]}, {"q": q[:, :, :1]}, {"q": q[0]}, {"window": 0}):
        with pytest.raises(ValueError, match=r"expected|does not fit"):
            causal_attention(**{"q": q, "k": k, "v": v, "implementation": IMPLEMENTATIONS[-1]} | bad)
