"""Imports run downwards only: each package may use those after it in this list, never those before."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src"
LAYERS = [
    "kvjax.experiments",
    "kvjax.configs",
    "kvjax",  # the package's own front door
    "kvjax.testing",
    "kvjax.tuner",
    "kvjax.evaluate",
    "kvjax.learning",
    "kvjax.generation",
    "kvjax.calibrate",
    "kvjax.checkpoints",
    "kvjax.models",
    "kvjax.caches",
    "kvjax.ops",
    "kvjax.quant",
    "kvjax.downloads",
    "kvjax.records",
    "kvjax.extras",
    "kvjax.files",
    "kvjax.tables",
    "kvjax.checks",
    "kvjax.mesh",
    "kvjax.hosts",
    "kvjax.programs",
    "kvjax.errors",
    "pallas_kernels",
]


def layer_of(module: str) -> str:
    """The most specific entry of LAYERS that holds the module."""
    fitting = [layer for layer in LAYERS if module == layer or module.startswith(layer + ".")]
    assert fitting, f"{module} is in no layer: say in {Path(__file__).name} which it belongs to"
    return max(fitting, key=len)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("kvjax", "pallas_kernels")}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


FILES = sorted(ROOT.glob("**/*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = LAYERS.index(layer_of(module))
    for name in filter(is_module, imports(file)):
        if (ROOT / name.replace(".", "/")).is_dir():
            continue  # a package named on the way to one of its modules, which is looked at itself
        assert LAYERS.index(layer_of(name)) >= here, f"{module} imports {name}, which is above it"
