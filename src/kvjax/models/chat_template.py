"""Chat templates: conversations become the texts that transformers' `apply_chat_template` writes."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.errors import KvjaxError
from kvjax.models import template_program

Message = Mapping[str, Any]  # {"role": ..., "content": a text or a list of parts, ...}
ChatTemplate = str | Mapping[str, str]  # Jinja; several where they have names

SECONDS = 4  # of computing, for all conversations of a call
PATIENCE = 15  # times SECONDS on the clock, for a busy machine
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; the first is the usual one
ANSWER = "kvjaxanswer"  # stands for an answer; letters only, which no template changes


def choose(templates: ChatTemplate | None, tools: bool) -> str:
    """Chooses among a model's templates as transformers does.

    Args:
      templates: one template, several with names, or None.
      tools: whether tools are given.

    Returns:
      The template: of several, "tool_use" where there are tools, else "default".

    Raises:
      KvjaxError: there is no template, or none of them is the default.
    """
    if templates is None:
        raise KvjaxError("the model has no chat template; give the text itself, with chat=False")
    if isinstance(templates, str):
        return templates
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise KvjaxError(f"the model's chat templates are {', '.join(sorted(templates))}; expected one named default")
    return templates[name]


def render(template: str, conversations: Sequence[Sequence[Message]], names: Mapping[str, Any]) -> list[str]:
    """Puts conversations into a template.

    The template runs in a sandbox within a process of its own, which has SECONDS of computing time and a limit on
    memory. It sees the conversation, `names` and the time, nothing else.

    Args:
      template: the template, Jinja.
      conversations: the messages of each. As in transformers, a message's keys whose value is None are left out, and
        its reasoning is seen under each name that templates use.
      names: what else the template sees: tools, documents, add_generation_prompt, special tokens.

    Returns:
      One text per conversation.

    Raises:
      KvjaxError: messages that are not JSON, or a template that is wrong, refuses the messages, or needs more time or
        memory than it has.
    """
    seen = [{**names, "messages": check_messages(each)} for each in conversations]
    try:
        request = json.dumps(
            {"template": template, "now": datetime.datetime.now().isoformat(), "conversations": seen}
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise KvjaxError(f"the chat holds what JSON does not: {error}") from None
    return _run(request)


def _run(request: str) -> list[str]:
    """The texts that the program answers with."""
    program = [sys.executable, "-P", template_program.__file__, str(SECONDS)]
    try:
        done = subprocess.run(
            program, input=request, capture_output=True, text=True, check=False, timeout=PATIENCE * SECONDS
        )
    except subprocess.TimeoutExpired:
        raise KvjaxError(f"the chat template ran longer than {PATIENCE * SECONDS} s") from None
    except OSError as error:
        raise KvjaxError(f"the chat template cannot be run: {error.strerror or error}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise KvjaxError(f"the chat template used up its {SECONDS} s of computing or its memory ({last[0]})")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise KvjaxError(f"the chat template cannot be applied: {answer['error']}")
    return answer["texts"]


def follow_up(template: str, messages: Sequence[Message], ended: str | None, names: Mapping[str, Any]) -> str:
    """Puts the messages that follow an answer into a template.

    The template sees a short conversation that ends with an answer, then the new messages. What it writes after that
    answer is the follow-up, whatever was said before.

    Args:
      template: the template, Jinja.
      messages: the new messages.
      ended: the stop token that stands after the answer already, None where there is none.
      names: what else the template sees.

    Returns:
      The text from the end of the answer to where the assistant answers again, without a stop token that stands there
      already.

    Raises:
      KvjaxError: as `render`, or the template does not show earlier answers.
    """
    parts = any(isinstance(each.get("content"), list | tuple) for each in check_messages(messages))
    said = [("user", "A"), ("assistant", ANSWER)]
    earlier = [{"role": who, "content": [{"type": "text", "text": it}] if parts else it} for who, it in said]
    text = render(template, [[*earlier, *messages]], names)[0]
    _, found, after = text.partition(ANSWER)
    if not found:
        raise KvjaxError("the chat template leaves earlier answers out, so a chat cannot go on; begin a new one")
    rest = after.lstrip()  # some templates write a blank before the stop token
    return rest[len(ended) :] if ended and rest.startswith(ended) else after


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checks a conversation and gives its messages as transformers shows them to a template.

    Args:
      messages: the messages.

    Returns:
      Them, without keys whose value is None, and reasoning under the names that templates use.

    Raises:
      KvjaxError: it is not a list of dicts with texts as keys, or it is empty.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise KvjaxError(f"the chat is {_describe(messages)}; expected a list of messages")
    return [_check_message(i, each) for i, each in enumerate(messages)]


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise KvjaxError(f"message {number} is {_describe(message)}; expected a dict with role and content")
    if not all(isinstance(key, str) for key in message):
        raise KvjaxError(f"message {number} has a key that is no text; expected role, content and the like")
    stated = {key: value for key, value in message.items() if value is not None}
    reasoning = next((stated[name] for name in REASONING if name in stated), None)
    return stated if reasoning is None else {"thinking": reasoning, **stated, REASONING[0]: reasoning}


def _describe(value: Any) -> str:
    return "empty" if isinstance(value, Sequence) and not value else f"of type {type(value).__name__}"
