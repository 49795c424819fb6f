"""Chat templates: transformers' texts for public families, follow-ups, and templates that would never end."""

import hashlib
import json
import time
from pathlib import Path

import pytest

from kvjax.downloads import Pinned, fetch
from kvjax.errors import KvjaxError
from kvjax.models import chat_template, template_program
from kvjax.models.chat_template import check_messages, choose, follow_up, render

FAMILIES = Pinned(
    name="chat-templates.jinja",
    packages=("axolotl==0.19.0",),
    members="axolotl/utils/chat_templates/templates/*.jinja",
    size=148927,
    sha256="c8cd2b29825a5e80c37ddddb9ae7ec27e1f99fb3ec14acd250657672876a364e",
)
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "templates.json").read_text(encoding="utf-8"))
NAMES = {"tools": None, "documents": None, "add_generation_prompt": True}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="session")
def families():
    """The templates by name."""
    try:
        joined = fetch(FAMILIES).read_bytes()
    except KvjaxError as error:
        pytest.skip(str(error))
    found = {}
    for name, golden in GOLDENS["templates"].items():
        found[name], joined = joined[: golden["bytes"]], joined[golden["bytes"] + len("\n\n") :]
        assert hashlib.sha256(found[name]).hexdigest() == golden["sha256"]
    return {name: content.decode() for name, content in found.items()}


@pytest.mark.parametrize("name", GOLDENS["templates"])
def test_texts_are_those_of_transformers(name, families):
    for key, expected in GOLDENS["templates"][name]["texts"].items():
        chat = NAMES | GOLDENS["words"] | GOLDENS["chats"][key]
        chat["messages"] = check_messages(chat["messages"])
        request = {"template": families[name], "now": GOLDENS["now"], "conversations": [chat]}
        answer = template_program.render(request)  # in this process: starting many takes long
        if expected is None:
            assert "error" in answer, key
            continue
        text = answer["texts"][0]
        if expected.startswith("sha256:"):
            text = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        assert text == expected, key


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0]|tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ {'b': '&', 'a': 1}|tojson(indent=1) }}", '{\n "b": "&",\n "a": 1\n}'),
        ("{{ {'b': 2, 'a': 1}|tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":1,"b":2}'),
        ("{% generation %}{{ bos_token }}{% endgeneration %}|{{ unk_token }}|", "<s>||"),
        ("{% for m in messages %}{% continue %}x{% endfor %}\n  {% if tools is none %}\ny{% endif %}", "y"),
        ("{{ dict(a=1).a }}{{ dict.fromkeys('x') }}", "1{'x': None}"),
        ("{{ strftime_now('%Y')|length }}", "4"),
    ],
    ids=str,
)
def test_environment(template, text):
    messages = [{"role": "user", "content": "<é>"}]
    assert render(template, [messages, messages], NAMES | {"bos_token": "<s>"}) == [text, text]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model{{ '\n' }}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "stop", "after"),
    [
        (CHATML, "<|im_end|>", "\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        (
            LLAMA3,
            "<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (MISTRAL, "</s>", "[INST] Hello [/INST]"),
        (LLAMA2, "</s>", "<s>[INST] Hello [/INST]"),  # as it was trained: one bos per turn
        (GEMMA, "<end_of_turn>", "\n<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"),
    ],
    ids=["chatml", "llama3", "mistral", "llama2", "gemma"],
)
def test_follow_up(template, stop, after):
    names = NAMES | {"bos_token": "<s>", "eos_token": "</s>"}
    assert follow_up(template, HELLO, stop, names) == after
    whole = follow_up(template, HELLO, None, names)
    assert whole.lstrip() == stop + after and follow_up(template, HELLO, "<|other|>", names) == whole


def test_follow_up_goes_on_where_a_conversation_ends(families):
    names = NAMES | GOLDENS["words"]
    earlier = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    for name in ("chatml", "llama3", "gemma3", "mistral_v2v3", "phi_4", "deepseek_v3", "exaone", "qwen_25"):
        whole = render(families[name], [[*earlier, *HELLO]], names)[0]
        before = whole[: whole.index("Me.") + len("Me.")]
        assert before + follow_up(families[name], HELLO, None, names) == whole, name


def test_parts_are_followed_by_parts(families):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert "Hello" in follow_up(families["llava"], parts, None, NAMES)


def test_a_template_without_earlier_answers_cannot_go_on():
    with pytest.raises(KvjaxError, match="leaves earlier answers out"):
        follow_up("{{ messages[-1].content }}", HELLO, None, NAMES)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "1 / 0",
            "1 + 'a'",
            "2.0 ** 99999",
            "undefined.x",
            "messages.x.y",
            "1 | nothing",
            "(",
            "raise_exception(7)",
        ),
        *("'a' * 10 ** 10", "'x' | center(10 ** 10)", "'%9999999999d' % 1", "'{:>9999999999}'.format(1)"),
        "[[1] * 10 ** 9] * 10",
        "range(10 ** 9) | list",
        "''.__class__.__mro__",
        "messages.append(1)",
        "cycler.__init__.__globals__",
    ],
)
def test_bad_expressions_are_refused(expression):
    with pytest.raises(KvjaxError, match=r"the chat template cannot be applied: [A-Z]"):
        render("{{ " + expression + " }}", [HELLO], NAMES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{{ lipsum(n=10**9) }}",
        "{{ 7 ** (7 ** 9) }}",
        "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
    ids=["loops", "doubling", "nesting", "words", "power", "text", "recursion"],
)
def test_endless_templates_end(template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(KvjaxError, match="the chat template"):
        render(template, [HELLO], NAMES)
    assert time.monotonic() - started < chat_template.PATIENCE


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "the chat is empty; expected a list of messages"),
        ("hello", "the chat is of type str"),
        ({"role": "user"}, "the chat is of type dict"),
        (["hello"], "message 0 is of type str; expected a dict"),
        ([{1: 2}], "message 0 has a key that is no text"),
        ([{"role": "user", "content": b"x"}], "holds what JSON does not: .*bytes"),
        ([{"role": "user", "content": {1, 2}}], "holds what JSON does not: .*set"),
    ],
    ids=str,
)
def test_other_messages_are_refused(messages, said):
    with pytest.raises(KvjaxError, match=said):
        render("x", [messages], NAMES)


def test_what_holds_itself_is_refused():
    content: list = []
    content.append(content)
    with pytest.raises(KvjaxError, match="holds what JSON does not"):
        render("x", [[{"role": "user", "content": content}]], NAMES)


def test_choice_among_templates():
    several = {"default": "a", "tool_use": "b"}
    assert [choose(several, tools) for tools in (False, True)] == ["a", "b"]
    assert choose({"default": "a"}, True) == choose("a", True) == "a"
    with pytest.raises(KvjaxError, match="rag, tool_use; expected one named default"):
        choose({"tool_use": "b", "rag": "c"}, False)
    with pytest.raises(KvjaxError, match="no chat template"):
        choose(None, False)


def test_clock():
    request = {"template": "{{ strftime_now('%d %b %Y') }}", "now": "2024-02-29T13:05:00", "conversations": [{}]}
    assert template_program.render(request) == {"texts": ["29 Feb 2024"]}
