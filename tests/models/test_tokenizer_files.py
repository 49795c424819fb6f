"""What the files of a HF folder say of its tokenizer: every key is used, known or refused."""

import json
import shutil

import pytest
from tokenizers import processors

from kvjax.errors import KvjaxError
from kvjax.models.tokenizer_files import read_backend, read_tokenizer


@pytest.fixture
def folder(goldens, tmp_path):
    """A tokenizer of single characters, with <unk>, <s> and </s> as ids 0 to 2."""
    shutil.copy(goldens / "qwen3" / "tokenizer.json", tmp_path)
    return tmp_path


def write(folder, name="tokenizer_config.json", **content):
    (folder / name).write_text(json.dumps(content))


def with_processor(folder, single, *words):
    backend = read_backend(folder / "tokenizer.json")
    special = [(word, backend.token_to_id(word)) for word in words]
    backend.post_processor = processors.TemplateProcessing(single, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))


def test_hf_folder(folder):
    write(folder, bos_token={"content": "<s>"}, eos_token="</s>", chat_template="old")
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (1, (2,), "old")
    write(folder, "generation_config.json", eos_token_id=[2, 5])
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.chat_template) == ((2, 5), "new")
    assert tokenizer.decode(tokenizer.encode("</s> a1\n")) == "</s> a1\n"


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(KvjaxError, match=r"tokenizer\.json is missing; put the model's tokenizer\.json there"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(KvjaxError, match="is not a tokenizer"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("stated", [None, False, True])
@pytest.mark.parametrize("processor", [None, "$A </s>", "<s> $A", "<s> $A </s>"])
def test_bos(folder, processor, stated):
    if processor:
        with_processor(folder, processor, "<s>", "</s>")
    write(folder, bos_token="<s>", eos_token="</s>", add_bos_token=stated, add_eos_token=True)
    tokenizer = read_tokenizer(folder)
    starts = stated or (processor is not None and processor.startswith("<s>"))
    assert tokenizer.encode("ab", start=True).tolist() == [1] * starts + tokenizer.encode("ab").tolist()


def test_words_are_those_of_the_config_not_the_stop_ids(folder):
    write(folder, eos_token="</s>", pad_token="<pad>", image_token={"content": "<img>"}, add_bos_token=False)
    write(folder, "special_tokens_map.json", unk_token="<unk>", additional_special_tokens=["<s>"])
    write(folder, "generation_config.json", eos_token_id=[5, 2])
    tokenizer = read_tokenizer(folder)
    words = {"eos_token": "</s>", "pad_token": "<pad>", "image_token": "<img>", "unk_token": "<unk>"}
    assert (tokenizer.words, tokenizer.eos_ids) == (words, (5, 2))
    write(folder, eos_token="</s>", added_tokens_decoder={}, extra_special_tokens={"sound_token": "<snd>"})
    assert read_tokenizer(folder).words == {"eos_token": "</s>", "sound_token": "<snd>"}  # no older files are read


def test_added_tokens(folder):
    size = read_backend(folder / "tokenizer.json").get_vocab_size()
    added = {str(size + 1): {"content": "<two>"}, str(size): {"content": "<one>", "special": True}}
    write(folder, added_tokens_decoder=added, additional_special_tokens=["ab", "a"])
    assert read_tokenizer(folder).encode("<one><two>").tolist() == [size, size + 1]
    write(folder, added_tokens_decoder={"7": {"content": "<one>"}})
    with pytest.raises(KvjaxError, match=r"'<one>' has the id .* in tokenizer.json; tokenizer_config.json says 7"):
        read_tokenizer(folder)


def test_templates(folder):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(folder, "chat_template.json", chat_template="last")
    assert read_tokenizer(folder).chat_template == "last"
    write(folder, chat_template=named)
    assert read_tokenizer(folder).chat_template == {"default": "a", "tool_use": "b"}
    write(folder, chat_template=named[:1])
    assert read_tokenizer(folder).chat_template == "a"
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("c")
    assert read_tokenizer(folder).chat_template == {"rag": "c"}  # as in transformers, files stand for all
    (folder / "chat_template.jinja").write_text("d")
    assert read_tokenizer(folder).chat_template == {"rag": "c", "default": "d"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "tokenizer_config.json",
            {"squeeze_spaces": True},
            r"squeeze_spaces of .*config\.json is True",
        ),
        ("tokenizer_config.json", {"odd_token": 5}, r"odd_token of tokenizer_config\.json is 5; expected a token"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "has split_special_tokens"),
        ("tokenizer_config.json", {"split_special_tokens": "no"}, "expected a bool"),
        ("tokenizer_config.json", {"add_bos_token": 1}, "add_bos_token .* is 1; expected a bool"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "does not put a space"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "added token 'x' is 'y'"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["y"]}, "expected a dict"),
        ("tokenizer_config.json", {"extra_special_tokens": {"x": 1}}, "x of tokenizer_config.json is 1"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "expected a name and a template"),
        ("tokenizer_config.json", {"chat_template": 5}, "of type int; expected a text"),
        ("special_tokens_map.json", {"squeeze_spaces": True}, r"squeeze_spaces of .*_map\.json is True"),
        ("generation_config.json", {"forced_words": [5]}, r"forced_words of .*generation_config\.json is \[5\]"),
        ("generation_config.json", {"eos_token_id": "x"}, "expected token ids"),
    ],
    ids=str,
)
def test_refused(folder, name, content, said):
    write(folder, name, **content)
    with pytest.raises(KvjaxError, match=said):
        read_tokenizer(folder)


def test_known_and_harmless(folder):
    write(folder, add_prefix_space=False, legacy=True, model_max_length=10**30, tokenizer_class="X", strange=None)
    write(folder, "generation_config.json", do_sample=True, repetition_penalty=1.05, suppress_tokens=[1])
    assert read_tokenizer(folder).encode("ab").size == 2


def test_keys_that_say_nothing_of_tokens_pass(folder):
    """Tools write keys of their own; a list cannot know them."""
    for name in ("tokenizer_config.json", "generation_config.json"):
        write(folder, name, **{"my_notes": "x", "squeeze_blanks": True, "forced_words": None, "add_blanks": False})
    read_tokenizer(folder)
