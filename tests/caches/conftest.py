from __future__ import annotations

import pytest

pytest.register_assert_rewrite("kvjax.testing.contract", "kvjax.testing.layers")

SLOW = {  # of the contract suite; of widths of attend, all but the odd one
    "test_sharded_over_devices",
    "test_saved_restored_and_grown",
    "test_attend_is_attention_over_materialize",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests of the contract suite take the first example of each method every time, all of them weekly."""
    from kvjax.caches.registry import methods
    from kvjax.testing.contract import WIDTH

    first = {method.examples[0] for method in methods()}
    for item in items:
        if item.path.name == "test_contract.py" and getattr(item, "originalname", "") in SLOW:
            values = item.callspec.params  # type: ignore[attr-defined]
            if values["text"] not in first and values.get("width") != WIDTH:
                item.add_marker(pytest.mark.weekly)
