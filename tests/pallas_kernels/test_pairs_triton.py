"""Every pair of widths in the Triton kernel."""

from __future__ import annotations

import pytest
from helpers import INTERPRETED
from test_packed_attention import Case, check, interpreted, reference, run

pytestmark = pytest.mark.skipif("triton" not in INTERPRETED, reason="another device's")


@pytest.mark.parametrize("case", interpreted(), ids=lambda case: f"k{case.key_bits}v{case.value_bits}")
def test_every_pair_of_widths(case: Case) -> None:
    check(run("triton", case, case.tensors()), reference(case), 3e-6)
