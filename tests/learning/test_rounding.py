"""What is read back equals the quantiser's, and the gradient is that of codes that stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.learning.rounding import rounded
from kvjax.ops.store import EXACT, Format
from kvjax.quant import affine

pytestmark = pytest.mark.usefixtures("quick_compilation")
FORMS = [
    Format(2, "channel", 8, 8),
    Format(3, "channel", 8, 16, "mse"),
    Format(2, "token", 4, 0, "unbiased"),
    Format(4, "token", 16, 0, "mse", 8),
]


def rows(tokens: int = 24) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((tokens, 16)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_are_the_quantisers(form: Format) -> None:
    x, counted = rows(), np.arange(24) >= 3
    q = affine.quantize(x, form.bits, form.group_axis, form.group, counted[:, None], form.fit, form.scale_bits)
    expected = affine.dequantize(q, form.group_axis, form.group, jnp.float32)
    found = rounded(jnp.asarray(x), form, jnp.asarray(counted))
    np.testing.assert_allclose(found[3:], expected[3:], atol=2e-5)


def test_the_last_group_may_be_short() -> None:
    x, form = rows(20), FORMS[0]
    found = rounded(jnp.asarray(x), form, jnp.ones(20, bool))
    q = affine.quantize(x[16:], form.bits, -2, 4)
    np.testing.assert_allclose(found[16:], affine.dequantize(q, -2, 4, jnp.float32), atol=2e-5)


def test_exact_values_pass() -> None:
    x = jnp.asarray(rows())
    np.testing.assert_array_equal(rounded(x, Format(EXACT, "token", 1, 0), jnp.ones(24, bool)), x)


def test_a_wider_group_has_the_gradient_of_larger_errors() -> None:
    """Of rows s x the errors are s times as large, so their squares grow with s; plain straight-through sees none."""
    x, counted = jnp.asarray(rows()), jnp.ones(24, bool)

    def error(s, form=FORMS[0]):
        return ((rounded(s * x, form, counted) - s * x) ** 2).sum()

    at = error(1.0)
    np.testing.assert_allclose(jax.grad(error)(1.0), 2 * at, rtol=1e-3)


def test_groups_of_one_value_have_finite_gradients() -> None:
    x = jnp.ones((8, 16))
    gradient = jax.grad(lambda x: rounded(x, FORMS[0], jnp.ones(8, bool)).sum())(x)
    assert np.isfinite(gradient).all()
