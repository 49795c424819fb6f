"""README.md stays short and without results; links lead somewhere; commands and caches that pages name exist."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

import kvjax
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.experiments.command import PROGRAMS
from kvjax.models.zoo import RANDOM

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
HOSTS = {"arxiv.org", "github.com"}
PAGES_OF_DOCSTRINGS = ROOT / "docs/api"  # mkdocstrings makes their anchors


def prose(page: Path) -> str:
    """A page's text without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|^ {4}\S.*$", "", text, flags=re.MULTILINE)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """The words of each kvjax command in a page's code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ {4,}(kvjax [a-z].*)$", text, re.MULTILINE)]


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 900


def test_readme_has_no_table_of_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!--" not in text
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if re.match(r"[-+]?\d*\.\d+\b", cell)]


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        host = re.match(r"https?://([^/]+)", link)
        if host:
            assert host[1] in HOSTS, link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert page is README or target.is_relative_to(ROOT / "docs"), f"{link}: not a part of the site"
        if anchor and PAGES_OF_DOCSTRINGS not in target.parents:
            assert anchor in anchors(target), link


def test_no_other_hosts_are_named() -> None:
    for page in (README, *DOCS):
        hosts = set(re.findall(r"https?://([\w.-]+)", page.read_text(encoding="utf-8")))
        assert hosts <= HOSTS, (page.name, hosts - HOSTS)


def test_the_site_shows_every_page_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = [str(page.relative_to(ROOT / "docs")) for page in DOCS]
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == pages


def test_the_api_reference_has_all_that_kvjax_gives() -> None:
    shown = re.findall(r"^::: kvjax\.(\w+)$", (ROOT / "docs/api/index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(set(kvjax.__all__) - {"__version__"})


@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if commands(page)], ids=lambda page: page.stem)
def test_commands_have_programs_fields_and_caches(page: Path) -> None:
    for _, name, *words in commands(page):
        program = PROGRAMS[name]
        importlib.import_module(f"kvjax.experiments.{program}")
        if name == "report":  # it takes folders
            continue
        given = dict(word.partition("=")[::2] for word in words if word.startswith("--config"))
        file, _, variant = given.pop("--config", program).partition(":")
        get_config = importlib.import_module(f"kvjax.configs.{Path(file).stem}").get_config
        config = get_config(variant) if variant else get_config()
        for field in given:
            assert field.removeprefix("--config.") in config, (name, field)
        if "--config.plugins" not in given and "$" not in given.get("--config.caches", ""):
            for cache in split_list(given.get("--config.caches", "dense")):
                CachePlan.parse(cache, RANDOM["random:llama-3.1-8b"])
