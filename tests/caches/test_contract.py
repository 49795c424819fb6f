"""The contract suite over every registered method and the example names that it gives, those in examples/ as well."""

from pathlib import Path

import pytest

from kvjax.caches.registry import load_plugins, methods
from kvjax.testing import contract
from kvjax.testing.contract import *  # noqa: F403

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGINS = ",".join(str(EXAMPLES / f"{name}.py") for name in ("fp8", "int8", "streaming_llm"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "text" in metafunc.fixturenames:
        load_plugins(PLUGINS)
        contract.NAMES.update(names=contract.specs_of(methods()), plugins=PLUGINS)
        metafunc.parametrize("text", contract.NAMES["names"])
