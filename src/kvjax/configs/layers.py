"""Each layer alone under a cache, all others dense: which layers does a cache ruin?

    kvjax layers --workdir=runs/layers

compiles a program for every layer and cache: ten to twenty minutes on two CPU cores.
"""

from ml_collections import config_dict

from kvjax.configs import perplexity


def get_config() -> config_dict.ConfigDict:
    config = perplexity.get_config()
    config.update(caches="k4v4@kivi,k2v2@kivi", context=512, windows=2)
    del config.over
    return config
