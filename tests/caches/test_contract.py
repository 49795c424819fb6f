"""The contract suite over every registered method and the example names that it gives, those in examples/ as well."""

from pathlib import Path

import pytest

from kvjax.caches.registry import load_plugins, methods
from kvjax.testing import contract
from kvjax.testing.contract import *  # noqa: F403

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGINS = ",".join(str(EXAMPLES / f"{name}.py") for name in ("e5m2", "int8", "streaming_llm"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "text" in metafunc.fixturenames:
        load_plugins(PLUGINS)
        contract.SETTINGS.update(plugins=PLUGINS)
        metafunc.parametrize("text", contract.specs_of(methods()))


@pytest.mark.weekly
def test_windows_sharded_over_devices() -> None:
    load_plugins(PLUGINS)
    names = contract.specs_of(methods())
    contract.SETTINGS.update(plugins=PLUGINS)
    found = contract.run_sharded(names, "--windows")
    assert {name: found.get(name, found[""]) for name in names} == dict.fromkeys(names, "equal")
