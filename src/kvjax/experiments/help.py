"""What a program's --help says: its config's fields with their defaults and comments, read from the config files."""

from __future__ import annotations

import ast
import difflib
import io
import runpy
import textwrap
import tokenize
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"
WIDTH = 80
FLAGS = {
    "--config=FILE[:VARIANT]": "another config: a file, or a name of kvjax/configs such as xquant:gqa",
    "--workdir=FOLDER": "for results and partial work; a run that was cut off goes on there",
    "--dry_run": "says what would be run, and in how many bytes; runs nothing",
    "--nocompile_cache": "does not keep compiled programs in $KVJAX_CACHE for the next start",
    "--distributed": "joins processes that TPU, Slurm or Open MPI started; docs/scaling.md has the other flags",
}


def nearest(name: str, known: Collection[str]) -> str:
    """The known name that was meant by one that is not known; "" where none is like it."""
    return next(iter(difflib.get_close_matches(name, known, 1, 0.75)), "")


def fields_of(config_file: Path, variant: str = "") -> dict[str, Any]:
    """A config's fields and their defaults.

    Args:
      config_file: the config.
      variant: what its get_config is called with; nothing where empty.
    """
    get_config = runpy.run_path(str(config_file))["get_config"]
    return get_config(*[variant] * bool(variant)).to_dict()


def comments_of(config_file: Path) -> dict[str, str]:
    """The fields of a config file, and of the configs that it changes, in their order, with the comments behind them.

    Args:
      config_file: a Python file that gives fields as keywords or as keys of a dict, one a line.

    Returns:
      Comments by field; "" where there is none.
    """
    text = config_file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found: dict[str, str] = {}
    for base in _bases(tree):
        found |= comments_of(CONFIGS / f"{base}.py")
    said = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    for name, line in _fields(tree):
        found[name] = said.get(line) or found.get(name, "")
    return found


def _bases(tree: ast.Module) -> Iterator[str]:
    """The configs that a config imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "kvjax.configs":
            yield from (alias.name for alias in node.names)


def _fields(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names that are given a value inside functions, and the lines on which the values end."""
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    for node in (each for function in functions for each in ast.walk(function)):
        if isinstance(node, ast.Call):
            yield from ((each.arg, each.value.end_lineno or 0) for each in node.keywords if each.arg)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value.end_lineno or 0
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield node.targets[0].attr, node.end_lineno or 0


def help_text(config_file: Path, variant: str = "") -> str:
    """The whole text, at most 80 columns wide where names allow.

    Args:
      config_file: the program's config.
      variant: of the config.
    """
    said = ast.get_docstring(ast.parse(config_file.read_text(encoding="utf-8"))) or ""
    paragraphs = ("\n".join(_wrapped(each)) for each in said.split("\n\n"))
    fields = _table(fields_of(config_file, variant), comments_of(config_file))
    flags = [
        line
        for flag, means in FLAGS.items()
        for line in (f"  {flag}", textwrap.indent(textwrap.fill(means, WIDTH - 6), " " * 6))
    ]
    return "\n\n".join([*paragraphs, "Fields, each set as --config.FIELD=VALUE:", fields, "Flags:", "\n".join(flags)])


def _wrapped(paragraph: str) -> list[str]:
    """A paragraph folded, a command as it is."""
    return [paragraph] if paragraph.startswith(" ") else textwrap.wrap(" ".join(paragraph.split()), WIDTH)


def _table(fields: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The fields in the order of the config files."""
    names = [name for name in comments if name in fields]
    names += [name for name in fields if name not in comments]
    return "\n".join(line for name in names for line in _field(name, fields[name], comments.get(name, "")))


def _field(name: str, value: Any, comment: str) -> list[str]:
    shown = value if isinstance(value, str) else repr(value)
    default = textwrap.shorten(shown.replace(",", ", "), 48, placeholder=" ...").replace(", ", ",")
    head = f"  {name}={default}"
    folded = textwrap.wrap(comment, WIDTH - 34)
    if len(head) < 33 and folded:
        return [head.ljust(34) + folded[0], *(" " * 34 + line for line in folded[1:])]
    return [head, *(" " * 34 + line for line in folded)]
