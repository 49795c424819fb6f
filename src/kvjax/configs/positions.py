"""Perplexity by position: does a cache's error grow with depth?

    kvjax positions --workdir=runs/positions

scores four windows of 2048 tokens: about five minutes on two CPU cores.
"""

from ml_collections import config_dict

from kvjax.configs import perplexity


def get_config() -> config_dict.ConfigDict:
    config = perplexity.get_config()
    config.update(caches="k8v8@kivi,k4v4@kivi,k2v2@kivi,k4v4@token", context=2048)
    config.parts = 8  # of a window, for each of which figures are stated
    del config.over
    return config
