"""Tables of docs/checkpoints.md: what becomes of each key of the files that kvjax reads, by the readers' lists."""

from __future__ import annotations

import json
from collections.abc import Mapping

from kvjax.checkpoints import gguf, gguf_tokenizer
from kvjax.checkpoints.names import FORMS
from kvjax.models import hf_config, tokenizer_files
from kvjax.models.keys import STEMS, KeyList


def fate(keys: KeyList, key: str) -> str:
    """What the reader does with a key: used, harmless, or refused unless it has one of some values."""
    if key in keys.used:
        return "used"
    if key in keys.harmless:
        return "harmless"
    values = ", ".join(f"`{json.dumps(value)}`" for value in keys.neutral.get(key, ()))
    return f"refused unless {values}" if values else "refused"


def lines(lists: Mapping[str, KeyList], skip: tuple[str, ...] = ()) -> list[list[str]]:
    """Rows [keys, what each list does with them]; keys of one fate share a row."""
    keys = dict.fromkeys(key for each in lists.values() for key in (*each.used, *each.neutral, *each.harmless))
    rows: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        if key not in skip:
            rows.setdefault(tuple(fate(each, key) for each in lists.values()), []).append(f"`{key}`")
    return [[", ".join(names), *cells] for cells, names in rows.items()]


def harmless() -> str:
    groups = {"Training": hf_config.TRAINING, "Generation": hf_config.GENERATION, "Records": hf_config.RECORDS}
    return "\n".join(f"- {name}: {', '.join(f'`{key}`' for key in keys)}." for name, keys in groups.items())


def stems() -> str:
    return ", ".join(f"`{stem}`" for stem in STEMS)


def config_lines() -> list[list[str]]:
    return lines(hf_config.KEYS, hf_config.HARMLESS)


def rope_lines() -> list[list[str]]:
    return lines(hf_config.ROPE_KEYS)


GGUF = {"llama, qwen2, qwen3": gguf.KEYS["llama"], "gemma3": gguf.KEYS["gemma3"]}


def gguf_lines() -> list[list[str]]:
    return lines(GGUF)


def form_lines() -> list[list[str]]:
    parts = {what: [f"`{part}`" for part in FORMS if FORMS[part] == what] for what in FORMS.values()}
    return [[", ".join(names), what] for what, names in parts.items()]


def noted_lines(table: Mapping[str, str]) -> list[list[str]]:
    """Rows [keys, what becomes of them] of a list that says so itself; keys of one fate share a row."""
    keys = {note: [f"`{key}`" for key in table if table[key] == note] for note in table.values()}
    return [[", ".join(names), note] for note, names in keys.items()]


TOKENIZERS = {
    "tokenizer-keys": tokenizer_files.TOKENIZER_CONFIG,
    "generation-keys": tokenizer_files.GENERATION_CONFIG,
    "gguf-tokenizer-keys": gguf_tokenizer.KEYS,
}
