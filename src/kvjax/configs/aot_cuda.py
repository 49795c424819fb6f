"""What the GPU kernels compile to, without a GPU: legality, registers, spills, shared memory and what the main
loop loads.

    kvjax aot_cuda --workdir=runs/aot

compiles them for three generations with what pip install 'kvjax[aot-cuda]' brings: about a quarter of an
hour on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        targets="a100,h100,b200",
        ops="packed_attention,packed_attention_jax_triton,quantize_pack,remat_attention,reconstruct,decode_step",
        bits="1/1,2/2,3/3,4/4,5/5,6/6,8/8,16/16,2/4,4/2,2/8,8/2,4/8,8/4,16/4",  # of keys/values; all: every pair
        modes="token,token32,kivi32",
        row_bits="2,3,4,8",  # of latents, inputs and deltas
        batch=1,
        heads=32,
        kv_heads=8,
        head_dim=128,
        tokens=32768,
        queries=1,
        rank=512,  # of the latents
        model_dim=4096,
        model="random:llama-3.1-8b",  # of the decode step
        caches="k4v4@token,k4v2@kivi",
        plugins="",  # modules or Python files that register more caches, separated by commas
        step_tokens=8192,
    )
