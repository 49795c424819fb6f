"""What a packed cache costs and saves on a device: every op against its floor and against bfloat16, and decode steps.

    kvjax throughput --config=throughput:cpu --workdir=runs/throughput

about five minutes on two CPU cores; `:gpu` and `:tpu` are for one device of that kind, with the shapes of 7B and 8B
models and random weights. A run stops before `minutes` are over and goes on where it was when started again.
"""

from ml_collections import config_dict

KVTUNER_325 = (  # KVTuner's plans for Llama-3.1-8B-Instruct in KIVI's mode
    "0+4+25+27:k2v2@kivi;1-3+7+29+31:k4v4@kivi;13+17:k8v4@kivi;5-6+8-12+14-16+18-24+26+28+30:k4v2@kivi"
)
KVTUNER_491 = (
    "0:k2v4@kivi;1-3+7+29+31:k4v4@kivi;4+6+8-12+14-16+18-20+22+25-28+30:k8v4@kivi;"
    "5+21+23-24:k4v2@kivi;13+17:k2v2@kivi"
)


def get_config(variant: str = "cpu") -> config_dict.ConfigDict:
    variants = {"cpu": _cpu, "gpu": _gpu, "tpu": _gpu}
    if variant not in variants:
        raise ValueError(f"variant {variant!r}; expected one of {', '.join(variants)}")
    return variants[variant]()


def _cpu() -> config_dict.ConfigDict:
    return config_dict.create(
        heads="32/8x128",  # of the ops: query heads / kv heads x head_dim
        pairs="k8v8@token,k4v4@token,k2v2@token,k8v8@kivi,k4v4@kivi,k2v2@kivi",  # of keys and values, of the ops
        ops="1x4096,1x32768",  # batch x tokens
        models="smollm2-135m",  # names, see kvjax.load
        caches="dense,k8v8@token,k4v4@token,k4v4@kivi,k2v2@token",  # of the models' steps
        plugins="",  # modules or Python files that register more caches, separated by commas
        points="1x7900",  # batch x tokens in the cache
        dtype="float32",  # of the weights, and of what a step keeps exact
        mesh="",  # devices that share a model and its steps: data=2,tensor=4, see kvjax.mesh; ops run on one device
        replicate="",  # logical axes that each device keeps whole, such as kv_heads
        rounds=15,  # of which the median counts
        calls=3,  # of an op in a round
        minutes=20.0,  # after which nothing new is begun
    )


def _gpu() -> config_dict.ConfigDict:
    config = _cpu()
    config.update(
        ops="1x32768,8x32768,32x8192",
        models="random:llama-3.1-8b,random:qwen2.5-7b,random:llama-2-7b",  # names, see kvjax.load
        caches=f"dense,k8v8@kivi,k4v4@kivi,k4v2@kivi,{KVTUNER_325},{KVTUNER_491},k4v4@token,x4,x2,xcl3",
        points="64x128,16x512,8x1024,8x8192,1x32768,1x131072,128x1024,256x1024,512x1024",
        dtype="bfloat16",  # or bfloat16, float64
        calls=16,
        minutes=9.0,  # after which nothing new is begun
    )
    return config
