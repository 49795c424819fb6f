"""What a task is: a name with settings, as `needle(context=2048)`, and figures of a model's answers."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from kvjax.caches import fields
from kvjax.evaluate.answers import Answers


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a task.

    Attributes:
      task: what it belongs to, a part of the task or all of it.
      metric: what it says.
      value: the mean over samples.
      stderr: its standard error; NaN where it is not known.
      samples: how many.
      by_seed: the value of every seed, where there are several.
    """

    task: str
    metric: str
    value: float
    stderr: float
    samples: int
    by_seed: tuple[float, ...] = ()

    @classmethod
    def of(cls, task: str, metric: str, values: Float[np.ndarray, "seeds samples"]) -> Figure:
        """The mean of values. The error is over samples, since the seeds of one sample depend on one another."""
        means = values.mean(0)
        stderr = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
        by_seed = tuple(values.mean(1).tolist()) if len(values) > 1 else ()
        return cls(task, metric, float(values.mean()), stderr, len(means), by_seed)


class Task(abc.ABC):
    """A frozen dataclass whose fields are the settings in its name."""

    form: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What result rows say of it beside its name, and are found by."""
        return {}

    @abc.abstractmethod
    def figures(self, answers: Answers) -> list[Figure]:
        """Asks and marks. Raises KvjaxError where the model cannot be asked."""

    def __str__(self) -> str:
        """The name, which holds the settings that are not the defaults."""
        return fields.to_text(self)
