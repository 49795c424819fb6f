"""Where texts come from, and what is refused."""

import datasets
import pytest

from kvjax.errors import KvjaxError
from kvjax.evaluate.text import load_text


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
