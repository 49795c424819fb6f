"""What the kernels compile to, without the device: legality, memory and a static cost.

    kvjax aot --config=aot:tpu --workdir=runs/aot

compiles every kernel for five generations of TPU with libtpu (pip install 'jax[tpu]'), no TPU needed: about an
hour on two CPU cores, most of it whole decode steps.
"""

from ml_collections import config_dict

OPS = "packed_attention,causal_attention,quantize_pack,remat_attention,reconstruct,decode_step"


def get_config(variant: str = "tpu") -> config_dict.ConfigDict:
    if variant != "tpu":
        raise ValueError(f"variant {variant!r}; expected tpu")
    return config_dict.create(
        platform=variant,  # tpu
        targets="v4:2x2x1,v5e:2x2,v5p:2x2x1,v6e:2x2,tpu7x:2x2x1",  # kinds of device, with their topology
        ops=OPS,  # kernels, and a whole decode step
        bits="1/1,2/2,3/3,4/4,5/5,6/6,8/8,16/16,4/2,8/4,16/4",  # of keys/values; all: every pair
        modes="token,token32,kivi32",  # of packed keys and values, with the group
        row_bits="4",  # of latents, inputs and deltas
        batch=8,  # sequences
        heads=32,  # of queries
        kv_heads=8,  # of keys and values
        head_dim=128,  # channels of a head
        tokens=32768,  # in the cache
        queries=1,  # of a sequence
        rank=512,  # of the latents
        model_dim=4096,  # channels of X
        model="random:llama-3.1-8b",  # of the decode step
        caches="k4v4@token,k4v2@kivi",  # of the decode step
        plugins="",  # modules or Python files that register more caches, separated by commas
        step_tokens=8192,  # in the decode step's cache, and of causal attention's prompt
    )
