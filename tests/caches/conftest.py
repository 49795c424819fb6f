from __future__ import annotations

import pytest

pytest.register_assert_rewrite("kvjax.testing.contract", "kvjax.testing.layers")

SLOW = {  # of the contract suite; of widths of attend, all but the odd one
    "test_sharded_over_devices",
    "test_saved_restored_and_grown",
    "test_attend_is_attention_over_materialize",
}
LONG = {
    "test_windows_and_stored_reads",
    "test_whole_windows_read_what_decoding_reads",
    "test_layers_of_another_kind",
    "test_loops_and_donation",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests of the contract suite take the first example of each method every time, all of them weekly.

    The long ones take the first of each method and mode.
    """
    from kvjax.caches.registry import methods, parse_spec
    from kvjax.testing.contract import WIDTH

    first, of_mode = set(), {}
    for method in methods():
        first.add(method.examples[0])
        for text in method.examples:
            of_mode.setdefault((method, getattr(parse_spec(text), "mode", None)), text)
    often = dict.fromkeys(SLOW, first) | {name: {*of_mode.values()} for name in LONG}
    for item in items:
        name = getattr(item, "originalname", "")
        if item.path.name == "test_contract.py" and name in often:
            values = item.callspec.params  # type: ignore[attr-defined]
            if values["text"] not in often[name] and values.get("width") != WIDTH:
                item.add_marker(pytest.mark.weekly)
