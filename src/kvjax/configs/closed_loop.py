"""How the error of the reconstructed layer input grows with depth: deltas in a closed loop against an open one.

    kvjax closed_loop --workdir=runs/closed_loop

About half a minute on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(model="smollm2-135m", text="demo", tokens=256, bits=3, base=2, base_bits=4)
