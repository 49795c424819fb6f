"""Scoring speed against HF transformers' float32 forward on the same machine.

    kvjax forward --workdir=runs/forward

times both in turn on four windows of 1024 tokens: about four minutes on two CPU cores; needs torch, transformers and
accelerate.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        caches="dense,k4v4@token,k4v4@kivi",  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        context=1024,  # tokens a window
        windows=4,  # of the text
        repeats=3,  # of each measurement, of which the median counts
    )
