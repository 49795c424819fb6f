"""What the GPU kernels compile to, without a GPU: legality, registers, spills, shared memory and what the main
loop loads.

    kvjax aot_cuda --workdir=runs/aot

compiles them for three generations with what pip install 'kvjax[aot-cuda]' brings: about a quarter of an
hour on two CPU cores.
"""

from ml_collections import config_dict

OPS = "packed_attention,packed_attention_jax_triton,quantize_pack,remat_attention,reconstruct,decode_step"


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        targets="a100,h100,b200",  # kinds of device, with their topology
        ops=OPS,  # kernels, and a whole decode step
        bits="1/1,2/2,3/3,4/4,5/5,6/6,8/8,16/16,2/4,4/2,2/8,8/2,4/8,8/4,16/4",  # of keys/values; all: every pair
        modes="token,token32,kivi32",  # of packed keys and values, with the group
        row_bits="2,3,4,8",  # of latents, inputs and deltas
        batch=1,  # sequences
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
        step_tokens=8192,  # in the decode step's cache
    )
