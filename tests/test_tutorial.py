"""docs/tutorial.md runs, block by block, with the model cut to its first layers: its 30 take minutes to compile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs/tutorial.md"
SHORTER = {'load("smollm2-135m")': 'load("smollm2-135m", layers=4)', "0-2:k8v8;3-29:": "0-2:k8v8;3:"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text(encoding="utf-8")
    for whole, cut in SHORTER.items():
        assert whole in text
        text = text.replace(whole, cut)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(TUTORIAL), "exec"), names)
    said = capsys.readouterr().out
    for each in ("k4v2@kivi", "(cut off)", "KL from the dense run", "expected 1, 2, 3, 4"):
        assert each in said, said
