"""docs/methods.md shows the examples as they are, and they stay short."""

import re
from pathlib import Path

from kvjax.caches.registry import BUILT_IN

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
MOST_LINES = {"e5m2": 25, "int8": 60}


def test_examples_on_the_page_are_the_files() -> None:
    files = {
        name: (ROOT / f"examples/{name}.py").read_text(encoding="utf-8") for name in (*MOST_LINES, "streaming_llm")
    }
    assert re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) == [files[name] for name in MOST_LINES]
    for name, text in files.items():
        lines = len(text.splitlines())
        assert lines <= MOST_LINES.get(name, lines)
        assert re.search(rf"`examples/{name}\.py`[^`]*\b{lines} lines", PAGE)


def test_every_method_is_on_the_page() -> None:
    for method in BUILT_IN:
        for form in (method.form, *method.aliases):
            assert re.sub(r"\{\w*bits\}", "{b}", form) in PAGE
