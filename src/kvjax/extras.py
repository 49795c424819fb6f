"""Packages that only some uses need: each use asks for its own in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvjax.errors import KvjaxError
from kvjax.files import brief

NEEDS = {  # by module: what needs which package, and what pip is given
    "datasets": ("the text of a data set needs datasets", "'kvjax[datasets]'"),
    "lm_eval": ("a task of lm-evaluation-harness needs lm-eval", "'kvjax[eval]'"),
    "matplotlib": ("drawing needs matplotlib", "'kvjax[plots]'"),
    "optuna": ("method=nsga2 needs optuna", "'kvjax[tune]'"),
    "pandas": ("to_pandas needs pandas", "pandas"),
    "pytest": ("the contract suite needs pytest", "'kvjax[test]'"),
    "sklearn": ("clustering layers needs scikit-learn", "'kvjax[tune]'"),
    "transformers": ("a comparison with HF transformers needs it and torch", "transformers torch accelerate"),
}


class MissingExtra(KvjaxError):
    """A package that the core does not install is needed here."""


@contextlib.contextmanager
def needed(module: str) -> Iterator[None]:
    """Around the imports of a package of NEEDS.

        with needed("optuna"):
            import optuna

    Raises:
      MissingExtra: it cannot be imported; the line says what to install.
    """
    try:
        yield
    except ImportError as error:
        need, install = NEEDS[module]
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        reason = "" if absent else f" ({brief(error)})"  # an old version, or one that lacks a package of its own
        raise MissingExtra(f"{need}{reason}; expected: pip install {install}") from None
