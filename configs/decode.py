"""One decode step at depth: milliseconds and temporary memory of every cache, in one interleaved run.

    python -m experiments.decode --config=configs/decode.py --workdir=runs/decode

prefills 7900 tokens of the demo text into each cache of a 135M-parameter model, then times single steps in turn:
about three minutes on two CPU cores. `dense` runs twice, with keys and values in float32 and in bfloat16.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",
        text="demo",
        caches="dense,k8v8@token,k4v4@token,k2v2@token,k4v4@kivi,k4v2@kivi,k2v2@kivi",
        dtype="float32",  # of the weights
        depth=7900,  # tokens in the cache before the first timed step
        max_len=8192,  # tokens allocated
        steps=25,  # timed steps of each cache
    )
