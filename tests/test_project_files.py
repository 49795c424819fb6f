"""What a project needs beside its code: workflows, templates and metadata that agree with one another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir())
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIELDS = {"textarea", "input", "dropdown", "checkboxes", "markdown"}


def read(file: Path) -> dict[str, Any]:
    return yaml.load(file.read_text(), yaml.BaseLoader)  # all scalars are texts: `on` is a key, 3.10 no number


def targets() -> set[str]:
    """What make can be asked for."""
    return {name for line in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.MULTILINE) for name in line.split()}


def values(job: dict[str, Any]) -> dict[str, list[str]]:
    """A job's matrix."""
    return job.get("strategy", {}).get("matrix", {})


def commands(job: dict[str, Any]) -> list[str]:
    """The commands of a job, for each value of its matrix."""
    found = []
    for step in job["steps"]:
        line = step.get("run", "")
        name = re.search(r"\$\{\{ matrix\.(\w+) \}\}", line)
        found += [line.replace(name[0], each) for each in values(job)[name[1]]] if name else [line]
    return [line for line in found if line]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_ask_make_for_what_it_has(file: Path) -> None:
    workflow = read(file)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        for line in commands(job):
            if line.startswith("make "):
                assert line.removeprefix("make ").split()[0] in targets(), line


def test_pythons_are_those_of_the_classifiers() -> None:
    said = [each.removeprefix("Programming Language :: Python :: ") for each in PROJECT["classifiers"]]
    (job,) = read(ROOT / ".github/workflows/tests.yml")["jobs"].values()
    assert values(job)["python"] == [version for version in said if re.fullmatch(r"3\.\d+", version)]
    assert PROJECT["requires-python"] == f">={values(job)['python'][0]}"


def test_weekly_runs_what_takes_long() -> None:
    (job,) = read(ROOT / ".github/workflows/weekly.yml")["jobs"].values()
    assert {"make test-weekly", "make aot-tpu", "make aot-cuda"} == set(commands(job))


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_issue_forms_have_what_their_host_asks_for(file: Path) -> None:
    form = read(file)
    if file.stem == "config":
        return
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["type"] in FIELDS and field["attributes"]["label"]


def test_hooks_run_what_lint_runs() -> None:
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    modules = [re.findall(r"-m (\w+(?: format| check)?)", hook["entry"])[0] for hook in local["hooks"]]
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    assert modules == re.findall(r"-m (\w+(?: format| check)?)", lint)


def test_every_target_says_what_it_does() -> None:
    said = {name for line in re.findall(r"^([a-z][a-z -]*):.*## \w", MAKEFILE, re.MULTILINE) for name in line.split()}
    assert said == targets() and {"sweep", "test"} <= said


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["version"] == PROJECT["version"]
    assert {"message", "title", "authors"} <= set(citation) and citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text and PROJECT["version"] in text


def test_the_wheel_holds_every_file_of_the_packages() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    asked = {file for name, globs in data.items() for each in globs for file in (ROOT / "src" / name).glob(each)}
    kept = {
        file for file in (ROOT / "src").rglob("*") if file.is_file() and not {".egg-info", ".pyc"} & _endings(file)
    }
    assert {file for file in kept if file.suffix != ".py"} == asked
    assert all((file.parent / "__init__.py").exists() for file in kept if file.suffix == ".py")


def _endings(file: Path) -> set[str]:
    return {Path(part).suffix for part in file.relative_to(ROOT).parts}
