"""The command `kvjax`: runs a program by its name, and lists what programs take."""

from __future__ import annotations

import ast
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvjax import __version__
from kvjax.caches.presets import shipped
from kvjax.caches.registry import load_plugins, methods
from kvjax.evaluate.text import ALIASES
from kvjax.experiments.help import CONFIGS, WIDTH, nearest
from kvjax.models.zoo import FILES, RANDOM

FOLDER = Path(__file__).parent
MAIN = {
    "sweep": "perplexity",
    "generate": "generate",
    "tune": "tune",
    "evaluate": "evaluate",
    "learn": "learn",
    "report": "report",
}
STUDIES = {
    file.stem: file.stem
    for file in sorted(CONFIGS.glob("*.py"))
    if (FOLDER / file.name).exists() and file.stem not in ("__init__", *MAIN.values())
}
PROGRAMS = MAIN | STUDIES


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the words after `kvjax` name; exits with 2 and one line where they name nothing.

    Args:
      argv: the words; those of the process where None.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    words = rest[:-1]
    if name in ("", "help", "--help", "-h"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name == "list":
        _list(words)
    elif name in PROGRAMS:
        sys.argv = [f"kvjax {name}", *words]
        runpy.run_module(f"kvjax.experiments.{PROGRAMS[name]}", run_name="__main__", alter_sys=False)
    else:
        _fail(name, "command", [*PROGRAMS, "list"])


def usage() -> str:
    """What to type."""
    rows = [
        *((name, _summary(module)) for name, module in MAIN.items()),
        ("list", f"What fields take: {'|'.join(LISTS)}."),
    ]
    return "\n".join(
        [
            "kvjax: compressed KV caches in JAX. To begin with:",
            "",
            "    kvjax sweep --workdir=runs/sweep",
            '    kvjax generate --config.cache=k4v2@kivi --config.prompt="What is a cache?"',
            "",
            "Programs (kvjax PROGRAM --help lists the fields of each):",
            "",
            *(textwrap.fill(f"  {name:10}{says}", WIDTH, subsequent_indent=" " * 12) for name, says in rows),
            "",
            *textwrap.wrap(f"Studies, run in the same way: {', '.join(STUDIES)}.", WIDTH),
        ]
    )


def _summary(module: str) -> str:
    """The first sentence of a program's docstring."""
    said = ast.get_docstring(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split())


def _models() -> Iterator[list[str]]:
    for name, pinned in FILES.items():
        yield [name, f"{pinned.size / 1e6:.0f} MB, fetched through pip once"]
    for name in RANDOM:
        yield [name, "random weights, for bytes and speed"]
    yield ["FOLDER or FILE", "safetensors or Orbax folder, GGUF file"]
    yield ["OWNER/NAME", "of the Hugging Face hub"]


def _texts() -> Iterator[list[str]]:
    yield ["demo", "essays, fetched through pip once"]
    for name, where in ALIASES.items():
        yield [name, f"{where} of the Hugging Face hub"]
    yield ["FILE", "UTF-8 text"]
    yield ["OWNER/NAME:CONFIG:SPLIT", "a data set of the Hugging Face hub"]


def _methods() -> Iterator[list[str]]:
    load_plugins("")
    for method in methods():
        yield [method.examples[0], (method.__doc__ or "").splitlines()[0]]


def _presets() -> Iterator[list[str]]:
    for plan in shipped():
        yield [f"kvtuner:{plan.name}@{plan.mode}", plan.model]


LISTS: dict[str, Callable[[], Iterator[list[str]]]] = {
    "models": _models,
    "texts": _texts,
    "methods": _methods,
    "presets": _presets,
}


def _list(words: Sequence[str]) -> None:
    for name in words or LISTS:
        if name not in LISTS:
            _fail(name, "list", list(LISTS))
        rows = list(LISTS[name]())
        print(f"{name}:", *(_folded(row) for row in rows), sep="\n")


def _folded(row: Sequence[str]) -> str:
    """A name and what it is, at most 80 columns wide where names allow."""
    return textwrap.fill(f"{row[0].ljust(30)}  {row[1]}", WIDTH, initial_indent="  ", subsequent_indent=" " * 34)


def _fail(name: str, kind: str, known: Sequence[str]) -> None:
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else f"expected one of {', '.join(known)}"
    print(f"error: unknown {kind} {name!r}; {hint}", file=sys.stderr)
    sys.exit(2)
