"""Tokenizers of HF folders: tokenizer.json, and what the files beside it say.

Every key of tokenizer_config.json and generation_config.json that may change the tokens is used, stands in a table
here, or is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from kvjax.errors import KvjaxError
from kvjax.files import brief, read_json
from kvjax.models.chat_template import ChatTemplate
from kvjax.models.keys import KeyList
from kvjax.models.tokenizer import Tokenizer, adds_space

_SLOW = "tokenizer.json holds the result: only the slow tokenizer reads it"
_OTHER = "of another kind of model"
_LENGTHS = "kvjax neither cuts nor pads a text"
_NOTE = "a note"

TOKENIZER_CONFIG = {  # key: what kvjax does with it
    "chat_template": "used, where no file holds the template",
    "added_tokens_decoder": "used: tokens that tokenizer.json lacks are added, with the same ids",
    "additional_special_tokens": "used: matched whole in a text",
    "extra_special_tokens": "used: matched whole in a text; named ones are seen by the template",
    "model_specific_special_tokens": "used: seen by the template",
    "add_bos_token": "used: true adds bos where the post-processor of tokenizer.json does not; false changes nothing",
    "add_eos_token": "no eos is added to a text that is to be gone on from",
    "add_prefix_space": "checked: refused where tokenizer.json does otherwise",
    "split_special_tokens": "checked: only false",
    "clean_up_tokenization_spaces": "texts are decoded as they are",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": "texts are decoded as they are",
    "spaces_between_special_tokens": "texts are decoded as they are",
    "trim_offsets": "offsets are not used",
    "model_max_length": _LENGTHS,
    "max_length": _LENGTHS,
    "max_len": _LENGTHS,
    "stride": _LENGTHS,
    "truncation": _LENGTHS,
    "truncation_side": _LENGTHS,
    "truncation_strategy": _LENGTHS,
    "padding": _LENGTHS,
    "padding_side": _LENGTHS,
    "pad_to_multiple_of": _LENGTHS,
    "pad_token_type_id": _LENGTHS,
    "model_input_names": "inputs of HF's models",
    "return_token_type_ids": "inputs of HF's models",
    "token_type_ids_pattern": "inputs of HF's models",
    "token_type_ids_include_special_tokens": "inputs of HF's models",
    "n_sequences": "inputs of HF's models",
    "tokenizer_class": "tokenizer.json says what the tokenizer does",
    "backend": "tokenizer.json says what the tokenizer does",
    "auto_map": "code beside the checkpoint, which is never run",
    "legacy": _SLOW,
    "legacy_behaviour": _SLOW,
    "from_slow": _SLOW,
    "sp_model_kwargs": _SLOW,
    "use_fast": _SLOW,
    "errors": _SLOW,
    "vocab_file": _SLOW,
    "merges_file": _SLOW,
    "vocab": _SLOW,
    "merges": _SLOW,
    "vocab_size": _SLOW,
    "tokenizer_file": _SLOW,
    "add_dummy_prefix": _SLOW,
    "fix_mistral_regex": _SLOW,
    "unk_id": _SLOW,
    "do_lower_case": _SLOW,
    "do_lowercase": _SLOW,
    "do_basic_tokenize": _SLOW,
    "do_split_on_punc": _SLOW,
    "split_by_punct": _SLOW,
    "never_split": _SLOW,
    "strip_accents": _SLOW,
    "keep_accents": _SLOW,
    "remove_space": _SLOW,
    "normalize": _SLOW,
    "tokenize_chinese_chars": _SLOW,
    "wordpieces_prefix": _SLOW,
    "max_input_chars_per_word": _SLOW,
    "use_default_system_prompt": "templates are in the files",
    "chat_format": "templates are in the files",
    "grounded_generation_template": "templates are in the files",
    "tool_use_template": "templates are in the files",
    "chat_control_tokens": "special tokens in a message are encoded as written",
    "response_schema": "answers are not parsed",
    "response_template": "answers are not parsed",
    "processor_class": _OTHER,
    "image_processor_type": _OTHER,
    "image_seq_length": _OTHER,
    "patch_size": _OTHER,
    "vision_feature_select_strategy": _OTHER,
    "src_lang": _OTHER,
    "tgt_lang": _OTHER,
    "extra_ids": _OTHER,
    "name_or_path": _NOTE,
    "special_tokens_map_file": _NOTE,
    "is_local": _NOTE,
    "local_files_only": _NOTE,
    "init_inputs": _NOTE,
    "device_map": _NOTE,
    "transformers_version": _NOTE,
    "_commit_hash": _NOTE,
    "trust_remote_code": _NOTE,
    "verbose": _NOTE,
    "unsloth_version": _NOTE,
}

_SAMPLING = "not applied: kvjax's generate states its own sampling"
_SEARCH = "not applied: kvjax samples one token at a time"
_CHANGES = "not applied: kvjax samples from the model's own logits"
_LENGTH = "not applied: kvjax's generate states its own lengths"
_RUN = "how transformers runs the model or what it returns"

GENERATION_CONFIG = {  # key: what kvjax does with it
    "bos_token_id": "used",
    "eos_token_id": "used: each of them ends generation",
    "pad_token_id": "kvjax pads with masks, not with tokens",
    "decoder_start_token_id": _OTHER,
    **dict.fromkeys(
        ("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        _SAMPLING,
    ),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "num_return_sequences", "seed"), _SAMPLING),
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "constraints"),
        _SEARCH,
    ),
    **dict.fromkeys(("force_words_ids", "penalty_alpha", "dola_layers", "low_memory"), _SEARCH),
    **dict.fromkeys(
        ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"), _CHANGES
    ),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"), _CHANGES),
    **dict.fromkeys(("forced_decoder_ids", "exponential_decay_length_penalty", "guidance_scale"), _CHANGES),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "watermarking_config"), _CHANGES),
    **dict.fromkeys(("token_healing", "presence_penalty", "frequency_penalty"), _CHANGES),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"), _LENGTH),
    **dict.fromkeys(("max_window_size", "max_context_size"), _LENGTH),
    "stop_strings": "not applied: generate takes stop_strings",
    **dict.fromkeys(
        ("use_cache", "cache_config", "cache_implementation", "max_cache_len", "prefill_chunk_size"), _RUN
    ),
    **dict.fromkeys(("compile_config", "disable_compile", "return_dict_in_generate", "output_attentions"), _RUN),
    **dict.fromkeys(("output_hidden_states", "output_logits", "output_scores", "continuous_batching_config"), _RUN),
    **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"), _RUN),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"), _RUN),
    **dict.fromkeys(("assistant_ensemble_weight", "target_lookbehind", "prompt_lookup_num_tokens"), _RUN),
    **dict.fromkeys(("max_matching_ngram_size", "speculation_type", "use_mtp"), _RUN),
    "chat_format": "templates are in the files",
    **dict.fromkeys(("user_token_id", "assistant_token_id"), "templates are in the files"),
    **dict.fromkeys(("transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code"), _NOTE),
}

# Parts of names that say: this key may change the tokens of a text, or which tokens an answer has.
_SPELLS = ("add_", "bos", "byte", "eos", "lower", "merge", "normali", "prefix", "space", "special", "split", "strip")
_CHOOSES = ("bias", "eos", "forced", "logit", "penalty", "stop", "suppress", "token")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a HF folder.

    It is tokenizer.json, with special tokens and chat templates from the folder's other files.

    Args:
      folder: the folder.

    Returns:
      The tokenizer.

    Raises:
      KvjaxError: there is no tokenizer.json, a file cannot be read, or a key says what kvjax cannot do.
    """
    backend = read_backend(folder / "tokenizer.json")
    config = _tokenizer_config(folder)
    words = _words(config)
    _add_tokens(backend, config, words)
    generation = _known(folder / "generation_config.json", GENERATION_CONFIG, _CHOOSES)
    # As in transformers, generation_config.json has the last word on where generation ends.
    ids = _optional_json(folder / "config.json") | generation
    bos, eos = (_ids(ids.get(f"{x}_token_id"), words.get(f"{x}_token"), backend) for x in ("bos", "eos"))
    _check_spaces(backend, config)
    tokenizer = Tokenizer(backend, bos[0] if bos else None, eos, _chat_template(folder, config), words)
    if config.get("add_bos_token") and not tokenizer.start_ids:
        start_with(backend, backend.token_to_id(_unicode(words.get("bos_token", ""))))
    return tokenizer


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json.

    Args:
      file: the file.

    Returns:
      The tokenizer of the `tokenizers` library, without truncation and padding.

    Raises:
      KvjaxError: it is missing, or it cannot be read.
    """
    if not file.is_file():
        raise KvjaxError(f"{file} is missing; put the model's tokenizer.json there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises nothing narrower, and a panic of its Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise KvjaxError(f"{file} is not a tokenizer: {brief(error)}") from None
    # Files set these for batches of training texts: here they would cut a text, or pad it.
    backend.no_truncation()
    backend.no_padding()
    return backend


def start_with(backend: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Says in a post-processor what a sequence starts with, so that a saved tokenizer says it too.

    Args:
      backend: the tokenizer, which is changed.
      bos_id: the token before every sequence, None for none.

    Raises:
      KvjaxError: the vocabulary lacks the token.
    """
    backend.post_processor = None
    if bos_id is None:
        return
    bos = backend.id_to_token(bos_id) if 0 <= bos_id < 2**32 else None
    if bos is None:
        raise KvjaxError(f"bos is the token id {bos_id}; the vocabulary has {backend.get_vocab_size()} tokens")
    token = {"id": "bos", "ids": [bos_id], "tokens": [bos]}
    backend.post_processor = processors.TemplateProcessing(["bos", "$A"], special_tokens=[token])


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _known(file: Path, table: Mapping[str, str], stems: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a JSON file that say something. One that may change the tokens is in the table, or is refused."""
    stated = {key: value for key, value in _optional_json(file).items() if value is not None}
    words = [key for key, value in stated.items() if key.endswith("_token") and _content(value) is not None]
    KeyList((*table, *words), stems=stems).check(stated, str(file))
    return stated


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what older files hold for it, in transformers' order."""
    config = _known(folder / "tokenizer_config.json", TOKENIZER_CONFIG, _SPELLS)
    if "added_tokens_decoder" not in config:
        config |= _known(folder / "special_tokens_map.json", TOKENIZER_CONFIG, _SPELLS)
        added = _optional_json(folder / "added_tokens.json")
        config["added_tokens_decoder"] = {str(i): {"content": content} for content, i in added.items()}
    for key, kind in (("added_tokens_decoder", dict), ("add_bos_token", bool), ("split_special_tokens", bool)):
        if key in config and not isinstance(config[key], kind):
            raise KvjaxError(f"{key} of {folder}'s tokenizer is {config[key]!r}; expected a {kind.__name__}")
    if config.get("split_special_tokens"):
        raise KvjaxError(f"{folder}'s tokenizer has split_special_tokens; kvjax encodes special tokens whole")
    return config


def _content(word: Any) -> str | None:
    """The text of a token: a text, or a dict that holds it."""
    content = word.get("content") if isinstance(word, Mapping) else word
    return content if isinstance(content, str) else None


def _words(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens with a name, which templates see."""
    named = {key: value for key, value in config.items() if key.endswith("_token") and type(value) is not bool}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), Mapping):
            named |= config[key]
    words = {key: _content(value) for key, value in named.items()}
    if wrong := [key for key, word in words.items() if word is None]:
        raise KvjaxError(f"{wrong[0]} of tokenizer_config.json is {named[wrong[0]]!r}; expected a token")
    return {key: word for key, word in words.items() if word is not None}


def _unicode(text: str) -> str:
    return text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], words: Mapping[str, str]) -> None:
    """Tokens that are matched whole in a text, as transformers adds them to those of tokenizer.json."""
    for key, value in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: item[0].zfill(9)):
        content = _content(value)
        if content is None or not (key.isdecimal() and len(key) < 10):
            raise KvjaxError(f"added token {key!r} is {value!r}; expected a token by its id")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        stated = {flag: bool(value[flag]) for flag in flags if isinstance(value, Mapping) and flag in value}
        backend.add_tokens([AddedToken(_unicode(content), **stated)])
        if (found := backend.token_to_id(_unicode(content))) != int(key):
            raise KvjaxError(
                f"added token {content!r} has the id {found} in tokenizer.json; tokenizer_config.json says {key}"
            )
    lists = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    extra = [_content(word) for each in lists if isinstance(each, list) for word in each]
    special = [_unicode(word) for word in (*words.values(), *extra) if word]
    # A token that the vocabulary lacks would get an id that the model has no row for.
    backend.add_special_tokens([word for word in special if backend.token_to_id(word) is not None])


def _check_spaces(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Refuses an add_prefix_space that tokenizer.json does not follow."""
    stated, adds = config.get("add_prefix_space"), adds_space(backend)
    if isinstance(stated, bool) and stated != adds:
        does = "puts" if adds else "does not put"
        raise KvjaxError(f"add_prefix_space of tokenizer_config.json is {stated}, but tokenizer.json {does} a space")


def _ids(value: int | list[int] | None, word: str | None, backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Token ids from a *_token_id, or else from a *_token."""
    if value is None and word is not None:
        value = backend.token_to_id(_unicode(word))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The templates in files of their own, or else those of tokenizer_config.json or chat_template.json."""
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    found: Any = {name: _read_text(file) for name, file in files.items()} or config.get("chat_template")
    if found is None:
        found = _optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(each, Mapping) and {"name", "template"} <= each.keys() for each in found):
            raise KvjaxError(f"the chat templates of {folder} are a list; expected a name and a template in each")
        found = {str(each["name"]): each["template"] for each in found}
    return found["default"] if isinstance(found, Mapping) and set(found) == {"default"} else found


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KvjaxError(f"{file} is not UTF-8: byte {error.start} does not decode") from None
