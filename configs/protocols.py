"""Streaming against decode, per token, on a ragged batch in float64 and float32.

    python -m experiments.protocols --config=configs/protocols.py --workdir=runs/protocols

gives differences of 1e-12 or less in float64; about four minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",
        text="demo",
        caches="k4v4@kivi,k4v2@token,k4v4@kivi(sink=4),0-9:k8v4@kivi;10-19:k4v2@token(sink=4);20-29:k2v3@kivi(rope=pre)",
        lengths="96,71",  # tokens of each sequence
    )
