"""Notebooks in examples/: each runs with small settings, and is kept with outputs and nothing of a machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SCORED = {
    "MODEL": str(ROOT / "tests/goldens/qwen3"),
    "TEXT": "the quick brown fox jumps over the lazy dog. " * 12,
    "CONTEXT": 32,
    "WINDOWS": 1,
}
READ = {name: SCORED[name] for name in ("MODEL", "TEXT")}
SMALL: dict[str, dict[str, Any]] = {  # in place of each notebook's first code cell
    "1_first_steps": {**SCORED, "PROMPT": "the quick brown fox", "CACHE": "k4v2@kivi", "NEW_TOKENS": 4},
    "2_compare_caches": {**SCORED, "CACHES": ["dense", "k4v4@token", "k2v2@token"]},
    "3_your_own_cache": {**SCORED, "CACHES": ["dense", "sym5"]},
    "4_tune_a_plan": {**SCORED, "CANDIDATES": "k8v8,k4v4,k2v2", "BUDGET": 5},
    "5_inspect_a_cache": {**READ, "CHARACTERS": 200, "CACHE": "k4v2@kivi", "LAYER": 1},
}
OF_A_MACHINE = re.compile(r"/(home|root|tmp|Users|mnt|opt|var)/\w|C:\\|localhost")


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def names(source: str) -> set[str]:
    """The names that a cell of settings sets."""
    found: set[str] = set()
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), "settings are assignments alone"
        found |= {node.id for node in ast.walk(statement.targets[0]) if isinstance(node, ast.Name)}
    return found


def test_each_has_settings() -> None:
    assert [file.stem for file in NOTEBOOKS] == [*SMALL]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path, keeping_programs: Mapping[str, str]) -> None:
    book, small = nbformat.read(file, 4), SMALL[file.stem]
    settings = code_cells(book)[0]
    assert names(settings.source) == {*small}
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    quick = {**keeping_programs, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "KVJAX_CACHE": str(tmp_path / "cache")}
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=quick)
    assert [cell.execution_count for cell in code_cells(book)] == [*range(1, len(code_cells(book)) + 1)]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_kept_with_its_outputs(file: Path) -> None:
    book = nbformat.read(file, 4)
    nbformat.validate(book)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]  # once, from top to bottom
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    drawing = [cell for cell in cells if "subplots" in cell.source]
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in drawing)
    assert book.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell.metadata for cell in book.cells)
    said = re.sub(r'"image/png": "[^"]*"', "", file.read_text())
    assert not OF_A_MACHINE.search(said)
    assert file.stat().st_size < 300_000
