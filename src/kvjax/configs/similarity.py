"""How alike the layer inputs, keys and values of neighbouring layers are, and which channels stick out.

    kvjax similarity --workdir=runs/similarity

Half a minute on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        tokens=512,  # of the text
    )
