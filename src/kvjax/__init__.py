"""kvjax: a JAX laboratory for compressed KV caches.

model = kvjax.load("smollm2-135m")
print(kvjax.generate(model, "What is a cache?", cache="k4v2@kivi").text)
print(kvjax.score(model, "demo", cache="k4v2@kivi"))
print(kvjax.sweep(model, "demo", ["dense", "k4v4", "k2v2"]).table())
print(kvjax.tune(model, "demo", budget=3.25).plan)
print(kvjax.roofline("random:llama-3.1-8b", "h100", "dense,k4v4@kivi,x4@head").table())
"""

import os
from importlib import metadata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before jax: XLA's alarm at a slow compile reads like an error

from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import load_plugins, register
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.calibrated import calibrated
from kvjax.evaluate.learned import learn_adapters, learn_model
from kvjax.evaluate.perplexity import Comparison, Score
from kvjax.evaluate.roofline import roofline
from kvjax.evaluate.sweep import Rows, score, sweep
from kvjax.generation.generate import Generation, generate, logits, plan, prefill, stream
from kvjax.generation.states import State, restore_state, save_state
from kvjax.learning.adapters import Adapters, adapted
from kvjax.learning.learn import learn
from kvjax.models.model import Model
from kvjax.tuner.tune import Tuning, tune

try:
    __version__ = metadata.version("kvjax")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Adapters",
    "CachePlan",
    "Comparison",
    "Generation",
    "KvjaxError",
    "Model",
    "Rows",
    "Score",
    "State",
    "Tuning",
    "__version__",
    "adapted",
    "calibrated",
    "generate",
    "learn",
    "learn_adapters",
    "learn_model",
    "load",
    "load_plugins",
    "logits",
    "plan",
    "prefill",
    "register",
    "restore_state",
    "roofline",
    "save_state",
    "score",
    "stream",
    "sweep",
    "tune",
]
