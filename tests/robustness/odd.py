"""Odd values, drawn at random: texts, numbers, things of the wrong type, chats, templates and plans."""

from __future__ import annotations

import decimal
import fractions
import itertools
import pathlib
import random
from typing import Any

import jax.numpy as jnp
import numpy as np

PIECES = (
    *("the quick brown fox ", "a", " ", "\n", "\r\n\t", "\x00", "\x1b[31m", "\x7f", "\ufeff", "\u200b", "\u202e"),
    *("é", "e\u0301", "ß", "日本語", "שלום", "\U0001f600", "\U0001f468\u200d\U0001f469", "\U0010ffff", "\ufffd"),
    *("\ud800", "\udcff", "\udc80\udcfe", "<s>", "</s>", "<|end|>", "\\", "'", '"', "%s", "../"),
    *("٣", "1e999", "NaN", "-1", "None", "[]", "demo", "a" * 20_000, "\u0301" * 2_000),
)
NUMBERS = (
    *(0, 1, 2, 3, 5, 8, 16, 64, 127, 128, -1, -(2**31), 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(10**400), 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-320, 1e308, float("inf"), -float("inf"), float("nan"), True, False, 2j),
    *(decimal.Decimal("1.5"), decimal.Decimal("sNaN"), fractions.Fraction(1, 3), np.int8(-3), np.uint64(2**64 - 1)),
    *(np.float16(2), np.bool_(True), np.str_("4")),
)
DTYPES = ("int8", "uint8", "int64", "uint64", "float16", "float64", "bool", "complex64", "U3", "S3", "datetime64[s]")


def text(rng: random.Random) -> str:
    """Zero to six pieces, or characters of any kind."""
    if rng.random() < 0.2:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 40)))
    return "".join(rng.choices(PIECES, k=rng.choice((0, 1, 1, 2, 3, 6))))


def array(rng: random.Random) -> Any:
    """An array of any shape and type."""
    shape = tuple(rng.choice((0, 1, 2, 7)) for _ in range(rng.choice((0, 1, 1, 2, 3))))
    made = np.full(shape, rng.choice((0, 1, 100))).astype(rng.choice(DTYPES))
    return jnp.asarray(made) if made.dtype.kind in "iuf" and rng.random() < 0.3 else made


def value(rng: random.Random, depth: int = 2) -> Any:
    """Anything that somebody may give where something else is expected."""
    makers = [
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(NUMBERS),
        lambda: text(rng),
        lambda: array(rng),
        lambda: rng.choice((None, ..., int, len, b"bytes", bytearray(b"\xff"), object, pathlib.Path("a"))),
        lambda: iter([1, 2]),
        lambda: range(rng.choice((0, 3, 10**12))),
    ]
    if depth:
        inner = lambda: value(rng, depth - 1)  # noqa: E731
        makers += [
            lambda: [inner() for _ in range(rng.randint(0, 4))],
            lambda: tuple(inner() for _ in range(rng.randint(0, 4))),
            lambda: {text(rng): inner(), rng.choice(("role", "content", 5)): inner()},
            lambda: {rng.randint(-2, 2), "a"},
            lambda: _holding_itself(rng),
        ]
    return rng.choice(makers)()


def _holding_itself(rng: random.Random) -> Any:
    chain: list[Any] = [1]
    chain.append(chain)
    return rng.choice((chain, {"role": "user", "content": chain}))


def ids(rng: random.Random) -> Any:
    """Token ids, most of them wrong somewhere."""
    some: list[Any] = [rng.randrange(128) for _ in range(rng.choice((0, 1, 5, 20, 300)))]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        some.insert(rng.randint(0, len(some)), rng.choice((*NUMBERS, None, "a", [1], {})))
    kind = rng.choice(("list", "tuple", "nested", "array", "array", "iterator", "range", "any"))
    if kind == "array":
        whole = [i for i in some if type(i) is int and 0 <= i < 2**31]
        return np.array(whole).astype(rng.choice(("int32", "int64", "uint8", "float32", "bool", "object")))
    made = {"tuple": tuple(some), "nested": [some, some[:3]], "iterator": iter(some), "range": range(5)}
    return value(rng) if kind == "any" else made.get(kind, some)


def messages(rng: random.Random) -> Any:
    """A chat, most often with something odd in it."""
    if rng.random() < 0.1:
        return value(rng)
    return [_message(rng) for _ in range(rng.choice((0, 1, 1, 2, 4)))]


def _message(rng: random.Random) -> Any:
    content = rng.choice(
        (
            "Hello",
            text(rng),
            value(rng),
            None,
            [{"type": "text", "text": text(rng)}, {"type": rng.choice(("image", 3)), "url": value(rng, 1)}],
        )
    )
    message = {"role": rng.choice(("user", "user", "assistant", "system", "tool", text(rng), value(rng, 1)))}
    if rng.random() < 0.9:
        message["content"] = content
    if rng.random() < 0.2:
        message[rng.choice(("tool_calls", "thinking", "name", 7, None))] = value(rng)  # type: ignore[index]
    return message


def prompt(rng: random.Random) -> Any:
    """A prompt or several, most often odd."""
    kinds = (text, text, ids, messages, value)
    if rng.random() < 0.6:
        return rng.choice(kinds)(rng)
    one = rng.choice(kinds)
    return [(one if rng.random() < 0.8 else rng.choice(kinds))(rng) for _ in range(rng.randint(0, 3))]


# ---- templates

NAMES = ("messages", "message", "bos_token", "tools", "x", "loop", "loop.index", "namespace", "self", "dict", "range")
ATOMS = (
    *NAMES,
    *("1", "0", "-3", "10**9", "2.5", "1e308", "'a'", "'<s>'", "none", "true", "[]", "{}", "[1, 'a']", "{'a': 1}"),
    *("messages[0]", "messages[0].content", "messages[0]['role']", "messages[99].x", "x.__class__.__mro__"),
    *("range(9)", "range(99999)", "range(10**9)", "strftime_now('%Y')", "strftime_now(5)", "raise_exception('no')"),
    *("cycler(1, 2).next()", "joiner(',')()", "lipsum(1)", "dict(a=1)", "dict.fromkeys('ab')", "namespace(a=1).a"),
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", ">=", "in", "not in", "and", "or", "is")
FILTERS = (
    *("length", "tojson", "tojson(indent=4)", "trim", "upper", "join(',')", "first", "last", "sum", "sort", "list"),
    *("int", "float", "abs", "round(400)", "reverse", "batch(3)", "slice(0)", "indent(9999)", "center(10**8)"),
    *("map('upper')", "map(attribute='x')", "selectattr('role', 'equalto', 'user')", "groupby('role')", "xmlattr"),
    *("replace('a', 'bb')", "format(1, 2)", "dictsort", "string", "safe", "urlize", "wordwrap(0)", "truncate(-1)"),
    *("random", "default('d')", "nothere", "striptags", "pprint", "filesizeformat", "unique", "min", "items"),
)
TESTS = ("defined", "none", "string", "mapping", "iterable", "divisibleby(0)", "sameas(1)", "nothere", "odd")
TAGS = (
    *("{% endif %}", "{% else %}", "{%", "{{", "}}", "{#", "{% break %}", "{% continue %}", "{% raw %}", "{% foo %}"),
    *("{% include 'a' %}", "{% import 'os' as x %}", "{% extends 'b' %}", "{% block a %}", "{% do x %}", "{{ }}"),
    *("{%- generation %}", "{% endgeneration %}", "{% set x %}", "{% macro m(a, a) %}", "{{ 1 if }}", "{% for %}"),
)
SLOW = (  # seconds each: few are tried
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "{{ ('a' * 40)|replace('a', 'b' * 10**6)|length * '1' }}",
)


def expression(rng: random.Random, depth: int = 3) -> str:
    """A Jinja expression."""
    if not depth or rng.random() < 0.3:
        return rng.choice(ATOMS)
    inner = lambda: expression(rng, depth - 1)  # noqa: E731
    forms = (
        lambda: f"({inner()} {rng.choice(OPERATORS)} {inner()})",
        lambda: f"({inner()})|{rng.choice(FILTERS)}",
        lambda: f"({inner()}) is {rng.choice(TESTS)}",
        lambda: f"({inner()} if {inner()} else {inner()})",
        lambda: f"{rng.choice(ATOMS)}[{inner()}:{inner()}]",
        lambda: f"{rng.choice(ATOMS)}({inner()}, a={inner()})",
    )
    return rng.choice(forms)()


def template(rng: random.Random, depth: int = 3) -> str:
    """A chat template, right or wrong, one in a hundred of the slow ones."""
    if depth == 3 and rng.random() < 0.01:
        return rng.choice(SLOW)
    return "".join(_statement(rng, depth) for _ in range(rng.randint(1, 4)))


def _statement(rng: random.Random, depth: int) -> str:
    dash = rng.choice(("", "", "-"))
    inner = (lambda: template(rng, depth - 1)) if depth > 1 else (lambda: text(rng)[:50])
    forms = (
        lambda: text(rng)[:200],
        lambda: text(rng)[:200],
        lambda: "{{" + dash + " " + expression(rng, 1) + " }}",
        lambda: "{{" + dash + " " + expression(rng) + " }}",
        lambda: f"{{% if {expression(rng, 2)} {dash}%}}{inner()}{{% else %}}{inner()}{{% endif %}}",
        lambda: f"{{% for message in {rng.choice(('messages', expression(rng, 2)))} %}}{inner()}{{% endfor %}}",
        lambda: f"{{% set x = {expression(rng, 2)} %}}{inner()}",
        lambda: f"{{% macro m(a) %}}{inner()}{rng.choice(('', '{{ m(a) }}'))}{{% endmacro %}}{{{{ m(x) }}}}",
        lambda: f"{{% for m in messages recursive %}}{rng.choice(('', '{{ loop([m]) }}'))}{inner()}{{% endfor %}}",
        lambda: (
            f"{{% set ns = namespace(a={expression(rng, 1)}) %}}{{% set ns.a = ns.a {rng.choice(OPERATORS)} 2 %}}"
        ),
        lambda: f"{{% generation %}}{inner()}{{% endgeneration %}}",
        lambda: rng.choice(TAGS) if rng.random() < 0.3 else "{{ x }}",
    )
    return rng.choice(forms)()


# ---- plans

METHODS = (
    "dense",
    "k4v4",
    "k8v4",
    "k2v2@token",
    "k4v2@kivi",
    "x4",
    "x3@latent",
    "x2@head",
    "xcl3",
    "xclr2",
    "k16v16",
)
FIELDS = (
    "group=32",
    "group=64",
    "residual=128",
    "sink=4",
    "rope=pre",
    "base=0",
    "base_bits=4",
    "per=channel",
    "fold=1",
)
MARKS = (
    *"@:;,()+-=.{}[]<>%\\/~ \t\n\x00",
    *("\u0663", "\u00b2", "\uff19", "\u2212", "\ud800", "--", "((", "))", "@@", ";;", "0x4", "1e3", "9" * 5000),
)
PATHS = (
    "plan.yaml",
    "preset.yaml@token",
    "preset.yaml@kivi(sink=4)",
    "nowhere.yml",
    ".yaml",
    "/.yaml@",
    "a\x00.yaml",
)


def plan(rng: random.Random, layers: int) -> str:
    """The name of a plan for a model of so many layers, mostly changed by a few characters."""
    made = rng.choice((_method, _layered, _layered))(rng, layers) if rng.random() < 0.9 else rng.choice(PATHS)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        at = rng.randint(0, len(made))
        made = made[:at] + rng.choice(MARKS) * rng.choice((0, 1, 1, 1, 300)) + made[at + rng.choice((0, 0, 1, 3)) :]
    return made


def _method(rng: random.Random, layers: int) -> str:
    fields = ",".join(rng.choices(FIELDS, k=rng.randint(1, 3)))
    return rng.choice(METHODS) + rng.choice(("", "", f"({fields})"))


def _layered(rng: random.Random, layers: int) -> str:
    cuts = sorted({0, layers, *(rng.randint(0, layers + 1) for _ in range(rng.randint(0, 2)))})
    parts = [f"{a}-{b - 1}:{_method(rng, layers)}" for a, b in itertools.pairwise(cuts)]
    return rng.choice((";", ";", ";", ",")).join(parts)
