"""The core alone: what is optional is asked for in one line where it is needed, and nothing else needs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvjax.errors import KvjaxError
from kvjax.extras import NEEDS, needed

ROOT = Path(__file__).parents[1]
QWEN = ROOT / "tests/goldens/qwen3"
ALONE = f"""
import sys
class Absent:
    def find_spec(self, name, *_):
        if name in {[*NEEDS]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
CORE = """
import kvjax, runpy
model = kvjax.load(sys.argv[1])
print(kvjax.generate(model, "the quick", cache="k4v2@token", max_new_tokens=2, chat=False).text)
try:
    kvjax.tune(model, "the quick brown fox", method="nsga2")
except kvjax.KvjaxError as error:
    print(error)
sizes = ["context=16", "windows=1", "caches=dense,k4v4@token", "text=" + sys.argv[2], "model=" + sys.argv[1]]
given = [f"--workdir={sys.argv[3]}", *(f"--config.{field}" for field in sizes)]
sys.argv = ["perplexity", "--config=src/kvjax/configs/perplexity.py", *given]
runpy.run_module("kvjax.experiments.perplexity", run_name="__main__")
"""


def extras() -> dict[str, str]:
    """The packages of each extra, in one text."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name: " ".join(packages) for name, packages in project["optional-dependencies"].items()}


@pytest.mark.parametrize("module", NEEDS)
def test_the_line_names_an_extra_that_brings_the_package(module: str) -> None:
    need, install = NEEDS[module]
    distribution = {"sklearn": "scikit-learn", "lm_eval": "lm-eval"}.get(module, module)
    if extra := re.fullmatch(r"'kvjax\[(\w+)\]'", install):
        assert distribution in extras()[extra[1]]
    else:
        assert distribution in install.split()
    assert distribution in need or module == "transformers"


def test_missing_and_broken_packages_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KvjaxError) as missing, needed("optuna"):
        import optuna  # noqa: F401
    assert str(missing.value) == "method=nsga2 needs optuna; expected: pip install 'kvjax[tune]'"
    (tmp_path / "lm_eval.py").write_text("import a_package_of_its_own")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    said = r"lm-eval \(No module named 'a_package_of_its_own'\); expected: pip"
    with pytest.raises(KvjaxError, match=said), needed("lm_eval"):
        import lm_eval  # noqa: F401


def test_the_core_generates_and_sweeps_alone(tmp_path: Path, keeping_programs: Mapping[str, str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 8)
    quick = {**keeping_programs, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", ALONE + CORE, QWEN, tmp_path / "text.txt", tmp_path / "runs"]
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "method=nsga2 needs optuna; expected: pip install 'kvjax[tune]'" in done.stdout.splitlines()
    assert [line for line in done.stdout.splitlines() if line.startswith("no plot") and "'kvjax[plots]'" in line]
    assert len((tmp_path / "runs/results.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "runs/pareto.png").exists()
