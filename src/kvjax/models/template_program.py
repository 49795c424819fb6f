"""Program that renders a chat template: a JSON request on stdin, a JSON answer on stdout.

A template comes with a checkpoint, and no list of Jinja's operations bounds what it may cost: `'a' * 10**10`, nested
loops, regular expressions, lists that hold themselves many times over. So it runs in a process of its own, in Jinja's
sandbox, with limits of the system on time and memory. `kvjax.models.chat_template` starts it; it imports no kvjax,
whose start takes longer than a template.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of address space
LONGEST = 1 << 23  # characters of a rendered text


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which marks what the assistant says: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(now: datetime.datetime) -> jinja2.Environment:
    """The environment that transformers gives to chat templates.

    Args:
      now: what `strftime_now` reads.

    Returns:
      The environment.
    """
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": now.strftime, "dict": _Dict()}
    return made


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Renders a template for several conversations.

    Args:
      request: {"template": text, "now": ISO time, "conversations": a list of the names that the template sees}.

    Returns:
      {"texts": one per conversation}, or {"error": why there is none}.
    """
    try:
        template = environment(datetime.datetime.fromisoformat(request["now"])).from_string(request["template"])
        return {"texts": [_bounded(template, names) for names in request["conversations"]]}
    except Exception as error:  # whatever a template's expressions raise
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST]}


def _bounded(template: jinja2.Template, names: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(names):
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise jinja2.TemplateError(f"the text has more than {LONGEST} characters")
    return "".join(parts)


def _limit(seconds: int) -> None:
    with contextlib.suppress(ImportError):  # not on every system
        import resource

        # Where a system refuses a limit, it stays as it is: the parent's own clock still ends the process.
        for kind, amount in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (amount, amount))


if __name__ == "__main__":
    task = json.load(sys.stdin)
    _limit(int(sys.argv[1]))
    json.dump(render(task), sys.stdout)
