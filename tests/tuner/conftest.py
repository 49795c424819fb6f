"""What the tests of searches share: a tiny model, and a text to search on."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvjax


@pytest.fixture(scope="module")
def model(goldens: Path) -> kvjax.Model:
    return kvjax.load(str(goldens / "llama-llama3"), "float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return str(file)
