"""Text from a model with a small cache.

    kvjax generate --config.cache=k4v4 --config.prompt="What is a cache?"

prints the first words within half a minute on two CPU cores, compile included, and about 25 tokens a second.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        dtype="float32",  # or bfloat16, float64
        mesh="",  # devices that share the model: data=2,tensor=4, see kvjax.mesh; one device where empty
        replicate="",  # logical axes that each device keeps whole, such as kv_heads
        cache="",  # a plan, see kvjax.caches.plan; k4v4 where neither this nor resume names one
        calibration="",  # a text that methods such as xclr2(basis=balanced) learn from; see kvjax.calibrated
        adapters="",  # a file that kvjax learn --config.what=lora left for this model
        plugins="",  # modules or Python files that register more caches, separated by commas
        prompt="Explain in two sentences what a cache is.",  # what the model is asked
        max_new_tokens=64,  # that are generated at most
        max_len=0,  # tokens to make room for; what the prompt (and what is resumed) needs where 0
        prefill_chunk=0,  # tokens of the prompt that are read at a time, all where 0; see kvjax.generate
        chat=True,  # put the prompt into the model's chat template, where it has one
        temperature=0.0,  # 0: greedy
        top_k=0,  # 0: all tokens
        top_p=1.0,  # 1: all tokens
        seed=0,  # of all that is drawn
        stop="",  # a text that ends the answer, which is shown up to it
        compare="",  # a list of plans instead of `cache`: their texts side by side
        save="",  # a new folder for what was read and written, to go on from
        resume="",  # such a folder: goes on with `prompt`, or where it stopped if that is empty
    )
