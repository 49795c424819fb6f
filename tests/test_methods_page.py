"""docs/methods has every method and a page for it, and shows the examples as they are; they stay short."""

import re
from pathlib import Path

from kvjax.caches.registry import BUILT_IN

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs/methods"
TABLE = (METHODS / "index.md").read_text(encoding="utf-8")
ADDING = (METHODS / "adding.md").read_text(encoding="utf-8")
MOST_LINES = {"e5m2": 25, "int8": 60}


def test_examples_on_the_page_are_the_files() -> None:
    files = {
        name: (ROOT / f"examples/{name}.py").read_text(encoding="utf-8") for name in (*MOST_LINES, "streaming_llm")
    }
    assert re.findall(r"```python\n(.*?)```", ADDING, re.DOTALL) == [files[name] for name in MOST_LINES]
    for name, text in files.items():
        lines = len(text.splitlines())
        assert lines <= MOST_LINES.get(name, lines)
        assert re.search(rf"`examples/{name}\.py`[^`]*\b{lines} lines", ADDING)


def test_every_method_is_in_the_table_and_on_the_page_that_it_names() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| `")]
    for method in BUILT_IN:
        for form in (method.form, *method.aliases):
            name = re.sub(r"\{\w*bits\}", "{b}", form)
            (row,) = [line for line in rows if re.search(rf"`{re.escape(name)}(@\w+)?`", line.split("|")[1])][:1]
            page = re.findall(r"\]\(([\w-]+\.md)", row)[-1]
            assert f"`{name}" in (METHODS / page).read_text(encoding="utf-8"), name


def test_every_page_of_a_method_has_its_bits_figures_and_a_command() -> None:
    for page in METHODS.glob("*.md"):
        if page.stem not in ("index", "adding", "floats"):
            text = page.read_text(encoding="utf-8")
            assert all(f"\n## {section}\n" in text for section in ("Bits", "Figures")), page.name
            assert "\n    kvjax " in text, page.name
