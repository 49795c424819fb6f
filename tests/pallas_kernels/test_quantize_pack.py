"""Every kernel that quantises and packs against plain jnp, bit for bit."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import INTERPRETED, QUICK, WITHOUT, values

from pallas_kernels.layout import PLANES
from pallas_kernels.quantize_pack import IMPLEMENTATIONS, quantize_pack

KERNELS = [name for name in INTERPRETED if name in IMPLEMENTATIONS]
FORMS = [("token", None), ("token", 32), ("channel", 32), ("channel", 8)]


def run(name: str, x, counted, bits: int, per: str, group: int, fit: str = "minmax"):
    call = functools.partial(
        quantize_pack,
        bits=bits,
        per=per,
        group=group,
        fit=fit,
        implementation=name,
        interpret=INTERPRETED.get(name, False),
    )
    planes, scale, zero = jax.jit(call, compiler_options=QUICK)(x, counted)
    return *planes, scale, zero


def same(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@functools.cache
def blocks():
    """Five blocks of 32 tokens, three heads, 64 channels: plain values, a constant, very small and very large ones,
    and one token that does not count."""
    x = values(1, 5, 3, 32, 64)
    x = x.at[1, 0].set(0.75).at[2].multiply(1e-6).at[3].multiply(2e4).at[3, :, 7, 9].set(1e9)
    counted = jnp.ones((5, 32), bool).at[4, :5].set(False)
    return x.at[4, :, :5].set(1e9), counted


@functools.cache
def odd_blocks():
    """Blocks whose tokens and channels fill no whole vector, and a token that does not count."""
    return values(3, 2, 1, 24, 40), jnp.ones((2, 24), bool).at[1, 20].set(False)


@functools.cache
def reference(bits: int, per: str, group: int, fit: str = "minmax"):
    return run("reference", *blocks(), bits, per, group, fit)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("bits", "form"), list(itertools.product(PLANES, FORMS)))
def test_bit_for_bit(name: str, bits: int, form: tuple[str, int | None]) -> None:
    agree(name, bits, form[0], form[1] or 64, "minmax")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("bits", "form"), [(1, FORMS[2]), (2, FORMS[1]), (2, FORMS[2]), (3, FORMS[3]), (8, FORMS[0])]
)
def test_fitted_bit_for_bit(name: str, bits: int, form: tuple[str, int | None]) -> None:
    agree(name, bits, form[0], form[1] or 64, "mse")


@pytest.mark.skipif("native" not in KERNELS, reason="another device's")
@pytest.mark.parametrize("without", WITHOUT, indirect=True)
@pytest.mark.parametrize("fit", ["minmax", "mse"])
@pytest.mark.parametrize("form", FORMS)
def test_native_on_lesser_cpus(form: tuple[str, int | None], fit: str, without) -> None:
    agree("native", 3, form[0], form[1] or 64, fit)


@pytest.mark.skipif("native" not in KERNELS, reason="another device's")
@pytest.mark.parametrize(("per", "group"), [("token", 40), ("token", 8), ("channel", 24), ("channel", 8)])
def test_native_on_blocks_of_any_size(per: str, group: int) -> None:
    x, counted = odd_blocks()
    same(*(run(name, x, counted, 4, per, group, "mse") for name in ("native", "reference")))


def agree(name: str, bits: int, per: str, group: int, fit: str) -> None:
    x, counted = blocks()
    found, wanted = run(name, x, counted, bits, per, group, fit), reference(bits, per, group, fit)
    keep = np.asarray(counted)
    if per == "token":  # nothing is said of what tokens that do not count are stored as
        found, wanted = (
            [*some[:-2], *(np.where(keep[:, None, None], a, 0) for a in some[-2:])] for some in (found, wanted)
        )
    same(found[-2:], wanted[-2:])
    same([a[:4] for a in found[:-2]], [a[:4] for a in wanted[:-2]])


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    x = values(2, 2, 2, 32, 64).at[0, 1, 3, 5].set(jnp.nan)
    *_, scale, zero = run(name, x, jnp.ones((2, 32), bool), 4, "channel", 32)
    for part in (scale, zero):
        assert np.isnan(part).sum() == 1 and np.isnan(part[0, 1, 0, 5])


WRONG = {
    "bits": {"bits": 7},
    "per": {"per": "head"},
    "group: 48": {"group": 48},
    "fit": {"fit": "keys"},
    "implementation": {"implementation": "cuda"},
    "counted": {"counted": jnp.ones((5, 31), bool)},
    "x: .*expected floats": {"x": jnp.zeros((5, 3, 32, 64), jnp.int8)},
    "x: blocks of 20": {"x": jnp.zeros((5, 3, 20, 64)), "counted": jnp.ones((5, 20), bool)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message: str) -> None:
    x, counted = blocks()
    settings = {"x": x, "counted": counted, "bits": 4, "per": "token", "group": 64, "implementation": "reference"}
    settings |= WRONG[message]
    with pytest.raises(ValueError, match=message):
        quantize_pack(settings.pop("x"), settings.pop("counted"), **settings)
