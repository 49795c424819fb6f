"""The command `kvjax`: programs by name, help, lists, hints and dry runs, from any folder."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from kvjax.caches.base import ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.experiments import command, dry_run, help, program

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests/goldens/qwen3")
CONFIGS = sorted(file for file in help.CONFIGS.glob("*.py") if file.stem != "__init__")


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", "from kvjax.experiments import command; command.main()", *words]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def parsed(name: str, *arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    program.parse(help.CONFIGS / f"{name}.py", [name, *arguments], values)
    return values


def refused(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        parsed(name, *arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_usage_names_every_program_in_80_columns() -> None:
    text = command.usage()
    assert all(name in text for name in command.PROGRAMS) and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("words", [("swep",), ("list", "model")])
def test_an_unknown_word_is_one_line_with_what_was_meant(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert (
        end.value.code == 2
        and f"did you mean {'sweep' if words == ('swep',) else 'models'}?" in capsys.readouterr().err
    )


def test_every_name_of_a_list_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in command.LISTS:
        command.main(["list", kind])
        assert capsys.readouterr().out.startswith(f"{kind}:\n")
    model = dataclasses.replace(ModelSizes.of(read_config(MODEL)), kv_heads=2)  # one example names two
    for name, _ in command.LISTS["methods"]():
        CachePlan.parse(name, model)
    for name, _ in command.LISTS["models"]():
        if name.startswith("random:"):
            read_config(name)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_help_has_every_field_its_default_and_a_comment(file: Path) -> None:
    fields, comments = help.fields_of(file), help.comments_of(file)
    assert all(comments.get(name) for name in fields), [name for name in fields if not comments.get(name)]
    text = help.help_text(file)
    assert all(f"  {name}=" in text for name in fields)
    told = text[text.index("Fields") :].splitlines()
    assert max(len(line) for line in told if not line.startswith("  -")) <= 80


def test_help_of_a_variant_and_of_another_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed("perplexity", "--config=xquant:mha", "--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "smollm2-135m-mha" in said and "--workdir" in said


def test_a_config_is_named_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parsed("perplexity", "--config=wikitext").config.text == "wikitext-2"
    assert parsed("perplexity", "--config=configs/xquant.py:mha").config.model == "smollm2-135m-mha"
    own = "from kvjax.configs import perplexity\n\n\ndef get_config():\n    config = perplexity.get_config()\n"
    Path("mine.py").write_text(own + "    config.windows = 7\n    return config\n")
    assert parsed("perplexity", "--config=mine.py").config.windows == 7


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--cache=k4v4", "did you mean --config.caches=k4v4?"),
        ("--caches=k4v4", "it is a field: --config.caches=k4v4"),
        ("--config.cachs=k4v4", "did you mean caches?"),
        ("--config=nowhere", "No such file"),
        ("--config=xquant:foo", "xquant has no variant 'foo'"),
        ("--config=tune", "config of another program"),
    ],
)
def test_hints(argument: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, "perplexity", argument)


def test_dry_run_counts_what_is_allocated_and_leaves_nothing(tmp_path: Path) -> None:
    done = started(tmp_path, "sweep", "--dry_run", f"--config.model={MODEL}", "--config.caches=dense,k4v4@token")
    assert done.returncode == 0, done.stderr
    *_, dense, packed, last = done.stdout.splitlines()
    plan = CachePlan.parse("k4v4@token", read_config(MODEL))
    assert packed.split()[:4] == [
        "k4v4@token",
        "4.00",
        f"{plan.bits_real(1024):.2f}",
        f"{plan.nbytes(1024, dtype='float32') / 1e6:.2f}",
    ]
    assert dense.startswith("dense") and last == "nothing was run" and not list(tmp_path.iterdir())


def test_dry_run_on_a_mesh_divides(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dry_run.Sizes(["k4v4@kivi"], 4096)
    nbytes = []
    for mesh in ("data=1", "tensor=8"):
        dry_run.show("random:llama-3.1-70b", "bfloat16", mesh, "", sizes)
        nbytes.append(float(capsys.readouterr().out.splitlines()[-2].split()[-1]))
    assert nbytes[0] == pytest.approx(8 * nbytes[1], rel=1e-3)


def test_from_a_folder_beside_one_that_is_called_kvjax(tmp_path: Path) -> None:
    (tmp_path / "kvjax").mkdir()
    done = started(tmp_path, "sweep")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: no --workdir; expected a folder for results, as in --workdir=runs/first"
    ]
