"""A model that its methods may learn a text of, and what must not be judged on that text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from kvjax.calibrate import statistics
from kvjax.evaluate.text import Text, check_disjoint, name_of, read_windows, split_texts, strip_paths
from kvjax.models.model import Model, check_model


def calibrated(model: Model, text: Text, *, context: int = 1024, windows: int = 4, offset: int = 0) -> Model:
    """The model with statistics of a text, from which methods such as `xclr2(basis=balanced)` learn.

    They are gathered in one pass up and one down through the layers, and kept in $KVJAX_CACHE/calibration under the
    checksum of the weights and the tokens. No windows that share tokens with them can be judged on this model.

    Args:
      model: what `kvjax.load` gives.
      text: see `kvjax.evaluate.text.read_ids`; names of several are separated by commas.
      context: tokens a window; fewer where the model takes fewer.
      windows: of each text.
      offset: tokens of each text that are skipped first.

    Raises:
      KvjaxError: a text that cannot be read or is too short, a model with learned sinks, or files that are damaged or
        cannot be written.
    """
    check_model(model)
    cut = calibration(model, text, min(context, model.config.max_positions), windows, offset)
    return statistics.calibrated(model, strip_paths(names_of(text)), cut)


def calibration(model: Model, text: Text, context: int, windows: int | None, offset: int) -> Int[np.ndarray, "w n"]:
    """The windows of all texts.

    Args:
      model: whose tokenizer counts.
      text: see `kvjax.evaluate.text.read_ids`; names of several are separated by commas.
      context: tokens a window.
      windows: of each text; as many as it has where None.
      offset: tokens of each text that are skipped first.

    Raises:
      KvjaxError: a text that cannot be read or is too short.
    """
    return np.concatenate([read_windows(each, model, context, windows, offset) for each in split_texts(text)])


def names_of(text: Text) -> str:
    """What result rows call several texts."""
    return ",".join(map(name_of, split_texts(text)))


def check_judged(model: Model, windows: Int[np.ndarray, "w c"]) -> None:
    """Raises KvjaxError where the windows share runs of tokens with those that the model is calibrated on."""
    if model.calibration is not None:
        check_disjoint(windows, model.calibration.windows)
