"""docs/checkpoints.md lists the keys that the readers list."""

from pathlib import Path

import pytest

from kvjax.experiments.pages import TABLES

PAGE = "docs/checkpoints.md"
TEXT = (Path(__file__).parents[1] / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES[PAGE])
def test_tables_are_up_to_date(name: str) -> None:
    _, render = TABLES[PAGE][name]
    assert f"<!-- {name} -->\n{render([])}\n<!-- end -->" in TEXT
