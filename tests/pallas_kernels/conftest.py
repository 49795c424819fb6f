"""What the tests of kernels share."""

from __future__ import annotations

import functools

import pytest
from helpers import native_without

from pallas_kernels import native


@pytest.fixture
def without(request, monkeypatch) -> None:
    """C++ kernels are those of a CPU without some instructions, named by a flag of the compiler."""
    monkeypatch.setattr(native, "register", functools.partial(native_without, request.param))
