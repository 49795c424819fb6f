"""Temporary memory of one prefill step at long context, as XLA's CPU compiler counts it.

    kvjax prefill_memory --workdir=runs/prefill_memory

compiles the step for two layers of Llama-3.1-8B at three lengths: a few minutes on two CPU cores; no weights needed.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="random:llama-3.1-8b",  # shapes, see kvjax.models.zoo
        layers=2,  # of the model that are compiled
        caches="dense,k4v2@kivi,x4@head,xcl3(base=0)",  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        tokens="8192,32768,131072",  # lengths of the prompt
        dtype="bfloat16",  # of weights, activations and what caches keep exactly
    )
