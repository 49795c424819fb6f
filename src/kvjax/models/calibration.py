"""The text that a model's methods learn from."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of a text.

    Attributes:
      text: its name.
      windows: token ids.
      digest: the sha256 of the model's weights and the token ids: what was learned is kept under it.
    """

    text: str
    windows: Int[np.ndarray, "w n"]
    digest: str

    @property
    def identity(self) -> dict[str, Any]:
        """What result rows and cards say of it."""
        return {
            "text": self.text,
            "tokens": self.windows.size,
            "context": self.windows.shape[1],
            "tokens_sha256": hashlib.sha256(self.windows.astype(np.int32).tobytes()).hexdigest(),
        }
