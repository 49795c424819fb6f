"""kvjax: a JAX laboratory for compressed KV caches.

model = kvjax.load("smollm2-135m")
print(kvjax.generate(model, "What is a cache?", cache="k4v2@kivi").text)
print(kvjax.score(model, "demo", cache="k4v2@kivi"))
"""

from kvjax.caches.registry import load_plugins, register
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score, score
from kvjax.generation.generate import Generation, State, generate, plan, prefill, stream
from kvjax.generation.states import restore_state, save_state
from kvjax.models.model import Model

__all__ = [
    "Generation",
    "KvjaxError",
    "Model",
    "Score",
    "State",
    "generate",
    "load",
    "load_plugins",
    "plan",
    "prefill",
    "register",
    "restore_state",
    "save_state",
    "score",
    "stream",
]
