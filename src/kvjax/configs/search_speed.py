"""Evaluations of cache plans per minute: kvjax's Simulator against HF transformers with a simulated cache.

    kvjax search_speed --workdir=runs/search_speed

evaluates the same plans by both in turn on two windows of 1024 tokens: about two minutes on two CPU cores; needs
torch and transformers.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        mode="kivi",  # or token
        context=1024,  # tokens a window
        windows=2,  # of the text
        plans=6,  # of each kind; the first warms up
        seed=0,  # of all that is drawn
    )
