"""Block, splits, warps and stages of packed attention, measured on the device at hand.

    kvjax tune_kernels --workdir=runs/tune-kernels

on one GPU. Writes runs/tune-kernels/DEVICE.json; put into pallas_kernels/tuning/ it is what the kernel uses there.
A run stops before `minutes` are over and goes on where it was.
"""

from ml_collections import config_dict

PAIRS = "k8v8@token,k4v4@token,k4v2@token,k2v2@token,k8v8@kivi,k4v4@kivi,k4v2@kivi,k2v2@kivi"


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        heads="32/8x128",  # query heads / kv heads x head_dim
        pairs=PAIRS,  # of keys and values
        points="1x32768,8x32768,64x1024",  # batch x tokens
        dtype="bfloat16",  # of queries
        rounds=5,  # of which the median counts
        calls=16,  # in a round
        minutes=9.0,  # after which nothing new is begun
        interpret=False,  # to try the program where there is no GPU
    )
