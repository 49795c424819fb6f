"""kvjax: a JAX laboratory for compressed KV caches.

model = kvjax.load("smollm2-135m")
kvjax.score(model, "demo", cache="k4v2@kivi")
"""

from kvjax.checkpoints.model import Model
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score, score
from kvjax.load import load

__all__ = ["KvjaxError", "Model", "Score", "load", "score"]
