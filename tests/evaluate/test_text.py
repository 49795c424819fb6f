"""Where texts come from, and what is refused."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from kvjax.errors import KvjaxError
from kvjax.evaluate.text import check_disjoint, check_unseen, is_literal, load_text, name_of, read_ids
from kvjax.models.tokenizer import ByteTokenizer


def test_demo():
    text = load_text("demo")
    assert len(text) == 643_926 and text.startswith("July 2010What hard liquor")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"ab\xff", "is not UTF-8: byte 2 does not decode"), (b" \n", "is empty; expected text")],
)
def test_refused_files(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(KvjaxError, match=message):
        load_text(str(tmp_path / "a.txt"))


def test_unknown():
    with pytest.raises(KvjaxError, match="no text 'wikitext'; expected a file, demo, wikitext-2 or name"):
        load_text("wikitext")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("rows", "expected"), [(["", " = A = \\n", "b\\n"], " = A = \nb\n"), (["one", "two"], "one\n\ntwo")]
)
def test_local_folder_like_the_hub(rows, expected, tmp_path, own_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    assert load_text(str(folder)) == load_text(f"{folder}:default:test") == expected
    with pytest.raises(KvjaxError, match=r"\(default, train\) cannot be loaded .*; without a network give the path"):
        load_text(f"{folder}:default:train")


def test_wikitext_without_a_network(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError(f"no way to {name} {config} {split}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        KvjaxError, match=r"no way to Salesforce/wikitext wikitext-2-raw-v1 test\); without a network"
    ):
        load_text("wikitext-2")


def test_line_endings_read_as_newlines(tmp_path):
    """WikiText's raw file has CRLF; scores are of the text, not of how it was stored."""
    file = tmp_path / "text.txt"
    file.write_bytes("é = A = \r\n b \n".encode())
    assert load_text(str(file)) == "é = A = \n b \n"


@pytest.mark.parametrize("text", ["a text", ": b c", "and/or: a text", "word " * 2000, "line\nline", "nul\0 here"])
def test_a_string_with_white_space_is_a_text(text):
    assert is_literal(text) and load_text(text) == text and name_of(text) == "a literal text"


def test_a_file_comes_before_a_literal_text(tmp_path):
    file = tmp_path / "my file: one.txt"
    file.write_text("inside")
    assert load_text(str(file)) == load_text(file) == "inside" and name_of(str(file)) == name_of(file) == str(file)
    with pytest.raises(KvjaxError, match="no text"):
        load_text(tmp_path / "no such file.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no text ''"), (" \n", "the text is empty"), ("a \udce9", "character 2"), ("x" * 9999, "no text")],
)
def test_strings_that_are_refused(text, message):
    with pytest.raises(KvjaxError, match=message):
        load_text(text)


def test_ids():
    for ids in ([1, 0, 255], np.array([1, 0, 255], np.uint8), (1, 0, 255)):
        read = read_ids(ids, ByteTokenizer(), 256)
        assert read.dtype == np.int32 and read.tolist() == [1, 0, 255] and name_of(ids) == "token ids"
    assert read_ids("a b", ByteTokenizer(), 256).tolist() == [97, 32, 98]


@pytest.mark.parametrize("ids", [[256], [-1], [1.0], [True], [[1]], [[1], [1, 2]], None, 3, [2**70]])
def test_ids_that_are_refused(ids):
    with pytest.raises(KvjaxError, match=r"expected (0 to 255|a text)"):
        read_ids(ids, ByteTokenizer(), 256)


def test_a_text_is_not_both_calibrated_on_and_judged(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a text")
    check_unseen("wikitext-2", "demo")
    check_unseen("Salesforce/wikitext:wikitext-2-raw-v1:validation,demo", "wikitext-2")
    check_unseen([1, 2], [1, 2])  # ids have no name: see check_disjoint
    for judged, seen in [
        ("wikitext-2,demo", "demo"),
        ("Salesforce/wikitext:wikitext-2-raw-v1", "wikitext-2"),
        (file, f"demo,{tmp_path}/../{tmp_path.name}/a.txt"),
        ("a literal text", "a literal text"),
    ]:
        with pytest.raises(KvjaxError, match="is both calibrated on and judged"):
            check_unseen(judged, seen)


def test_windows_that_share_a_run_of_tokens_are_refused() -> None:
    ids = np.random.default_rng(0).integers(0, 50_000, 400)
    check_disjoint(ids[:200].reshape(2, 100), ids[200:].reshape(4, 50))
    check_disjoint(ids[:200].reshape(2, 100), ids[169:369].reshape(1, 200))  # 31 tokens
    with pytest.raises(KvjaxError, match="share 1 runs of 32 tokens"):
        check_disjoint(ids[:200].reshape(2, 100), ids[168:368].reshape(1, 200))
    with pytest.raises(KvjaxError, match="share 1 runs of 10 tokens"):
        check_disjoint(ids[:10][None], ids[None])
