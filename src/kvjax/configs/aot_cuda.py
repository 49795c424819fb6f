"""What the GPU kernels compile to, without a GPU: legality, registers, spills, shared memory and what the main
loop loads.

    kvjax aot_cuda --workdir=runs/aot

compiles them for three generations with what pip install 'kvjax[aot-cuda]' brings: about a quarter of an
hour on two CPU cores.
"""

from ml_collections import config_dict

from kvjax.configs import aot

OPS = (
    "packed_attention,packed_attention_jax_triton,causal_attention,quantize_pack,remat_attention,reconstruct,"
    "decode_step"
)
BITS = "1/1,2/2,3/3,4/4,5/5,6/6,8/8,16/16,2/4,4/2,2/8,8/2,4/8,8/4,16/4"


def get_config() -> config_dict.ConfigDict:
    config = aot.get_config()
    del config.platform
    config.update(ops=OPS, bits=BITS, row_bits="2,3,4,8", batch=1)
    config.targets = "a100,h100,b200"  # kinds of device
    return config
