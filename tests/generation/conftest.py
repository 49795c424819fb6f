"""What the tests of generation share: one tiny model, so that programs are shared too."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvjax
from kvjax.models.model import Model


@pytest.fixture(scope="session")
def tiny(goldens: Path) -> Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")
