"""Every pair of widths in the jax-triton kernel, on a GPU."""

from __future__ import annotations

import pytest
from helpers import INTERPRETED
from test_packed_attention import PAIRS, Case, check, reference, run

pytestmark = pytest.mark.skipif("jax_triton" not in INTERPRETED, reason="another device's")


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"k{case.key_bits}v{case.value_bits}")
def test_every_pair_of_widths(case: Case) -> None:
    check(run("jax_triton", case, case.tensors()), reference(case), 3e-6)
