"""Encoders, adapters of a model for a cache, or a model, that are trained on a text and judged on another.

    kvjax learn --workdir=runs/learn
    kvjax learn --config=learn:lora --workdir=runs/lora
    kvjax learn --config=learn:model --workdir=runs/mha

trains `xclr2` on the demo essays and judges it on WikiText-2 beside the basis it begins with: about ten minutes on
two CPU cores. --config.polish=60 then trains all layers together by KL, about ten minutes more. `:lora` trains
adapters of q, k, v and o for `k2v2@kivi`, see kvjax.learn_adapters. `:model` trains a small decoder over bytes that
has as many kv heads as heads, see kvjax.learn_model: half an hour. --config.model=random:mha-85m is for a GPU, and
--config.model=smollm2-135m-mha trains a model further whose kv heads are copies, so that they part.
"""

from ml_collections import config_dict

MHA = "dense,k4v4@kivi,k2v2@kivi,x4@input,x2@input,xcl3@input,xcl2@input"


def get_config(variant: str = "encoders") -> config_dict.ConfigDict:
    config = _encoders()
    if variant == "lora":
        config.update(what="lora", cache="k2v2@kivi", rate=1e-3)
    elif variant == "model":
        config.update(what="model", model="random:mha-5m", cache=MHA, rate=1e-3, batch=8, steps=600, seen_windows=0)
    elif variant != "encoders":
        raise ValueError(f"variant {variant!r}; expected encoders, lora or model")
    return config


def _encoders() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        what="encoders",  # of the cache; lora: adapters of the model for the cache; model: all its weights
        calibration="demo",  # the text that is learned from, see kvjax.calibrated
        cache="xclr2(basis=learned,gain=1)",  # of every layer: x{b}@latent or xcl{b}@latent(fold=1), basis=learned;
        # for a model: those that are judged with it, separated by commas
        judged_on="wikitext-2",  # texts that are not learned from, separated by commas
        protocol="streaming",  # of judging; or decode, parallel
        context=512,  # tokens a judged window
        windows=4,  # of each judged text
        offset=0,  # tokens skipped first
        steps=100,  # of Adam, of every layer alone; of all together for adapters and models
        rate=1e-4,  # of Adam in a layer
        polish=0,  # steps of all layers together, by KL divergence
        polish_rate=3e-5,  # of Adam in all layers together
        rank=8,  # of adapters
        seen_context=512,  # tokens a window that adapters and models are learned from
        seen_windows=32,  # of each text that they are learned from, 0: as many as it has (models); the last choose
        batch=1,  # windows a step of a layer or a model; a mesh's axis data divides them
        plugins="",  # modules or Python files that register more caches, separated by commas
        dtype="float32",  # or bfloat16
        mesh="",  # devices that share the model: data=2,tensor=4, see kvjax.mesh; one device where empty
        replicate="",  # logical axes that each device keeps whole, such as kv_heads
    )
