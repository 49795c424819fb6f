"""Compile time of the decode loop by the number of layers.

    kvjax compile_seconds --workdir=runs/compile_seconds

compiles a narrow Llama with 2 to 80 layers: a few minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        layers="2,8,32,80",  # of each compiled model
        caches="dense,k4v2@kivi",  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        model_dim=256,  # of the model, as the next four
        mlp_dim=512,  # hidden width of the MLP
        heads=4,  # of queries
        kv_heads=2,  # of keys and values
        vocab_size=512,  # tokens
        max_len=1024,  # tokens that the cache has room for
        dtype="float32",  # of weights, activations and what caches keep exactly
    )
