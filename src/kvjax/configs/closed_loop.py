"""How the error of the reconstructed layer input grows with depth: deltas in a closed loop against an open one.

    kvjax closed_loop --workdir=runs/closed_loop

About half a minute on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        tokens=256,  # of the text
        bits=3,  # of the deltas
        base=2,  # the layer that deltas are counted from
        base_bits=4,  # of layers 0 to `base`
    )
