"""What is trained on a text: `kvjax.learn_adapters`, `kvjax.learn_model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.evaluate.calibrated import calibration, names_of
from kvjax.evaluate.text import Text, strip_paths
from kvjax.learning.adapters import Adapters
from kvjax.learning.distill import distill
from kvjax.learning.pretrain import pretrain
from kvjax.learning.training import Curve
from kvjax.models.calibration import Calibration
from kvjax.models.model import Model, check_model


def text_of(model: Model, text: Text, context: int, windows: int | None, offset: int = 0) -> Calibration:
    """What is learned from, see `kvjax.evaluate.calibrated.calibration`; no statistics of it are gathered."""
    return Calibration(strip_paths(names_of(text)), calibration(model, text, context, windows, offset), "")


def learn_adapters(
    model: Model,
    cache: str | CacheSpec | CachePlan,
    text: Text,
    *,
    context: int = 512,
    windows: int = 32,
    offset: int = 0,
    rank: int = 8,
    steps: int = 100,
    rate: float = 1e-3,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Adapters:
    """Trains low-rank adapters of q, k, v and o so that a model under a plan predicts what it does without one.

    The loss is the KL divergence from the exact model, every token read as it is stored (LoRA, arXiv 2106.09685;
    straight-through gradients). The model itself is not changed: `kvjax.adapted` gives one that is.

    Args:
      model: what `kvjax.load` gives.
      cache: the plan; methods that compute bases of the weights are refused, since the weights change.
      text: see `kvjax.evaluate.text.read_ids`; names of several are separated by commas.
      context: tokens a window.
      windows: of each text. The last of all chooses among the steps; the others are learned from, one a step.
      offset: tokens of each text that are skipped first.
      rank: of every adapter.
      steps: of Adam.
      rate: its learning rate, which falls to 0 by a cosine.
      folder: from which a run that was cut off goes on; a temporary one where None.
      progress: called as progress(step, steps) at every step.

    Raises:
      KvjaxError: a plan or text that is refused, numbers that are not possible, or files that cannot be written.
    """
    check_model(model)
    plan = CachePlan.cast(cache, model.config)
    seen = text_of(model, text, context, windows, offset)
    return distill(model, plan, seen, rank, steps, rate, folder, progress or (lambda step, steps: None))


def learn_model(
    model: Model,
    text: Text,
    *,
    context: int = 512,
    windows: int | None = None,
    offset: int = 0,
    batch: int = 8,
    steps: int = 1000,
    rate: float = 1e-3,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, Curve]:
    """Trains all weights of a model to predict the next token of a text, with exact keys and values.

    Random weights are trained from scratch (`random:mha-5m`), others further. `smollm2-135m-mha` has every kv head
    several times; trained on, the copies part, since each serves a query head of its own.

    Args:
      model: what `kvjax.load` gives, in float32 or float64. It is not changed.
      text: see `kvjax.evaluate.text.read_ids`; names of several are separated by commas.
      context: tokens a window.
      windows: of each text; as many as it has where None. One in ten, and 16 at most, are not trained on; they choose
        among the steps.
      offset: tokens of each text that are skipped first.
      batch: windows a step.
      steps: of Adam with weight decay (AdamW, arXiv 1711.05101).
      rate: its learning rate, which rises over the first twentieth and then falls to 0 by a cosine.
      folder: from which a run that was cut off goes on; a temporary one where None.
      progress: called as progress(step, steps) at every step.

    Returns:
      The model at its best step, and the curve: (step, nats per token of the windows that choose) at every look.

    Raises:
      KvjaxError: a model or text that is refused, numbers that are not possible, or files that cannot be written.
    """
    check_model(model)
    seen = text_of(model, text, context, windows, offset)
    return pretrain(model, seen, batch, steps, rate, folder, progress or (lambda step, steps: None))
