"""Tasks that a model is asked with each cache.

    kvjax evaluate --workdir=runs/evaluate
    kvjax evaluate --config.tasks="arc_easy(samples=200)" --workdir=DIR

    kvjax evaluate --config=evaluate:frontier --config.calibration=FILE --workdir=DIR

asks a 135M-parameter model for hidden numbers and chains of variables in contexts of 1024 tokens. Tasks of
lm-evaluation-harness, by name or as YAML files, need `pip install 'kvjax[eval]'`. `:frontier` asks with each of the
frontier's methods at 2 and 4 bits, with its equal exact tokens; methods that learn do so from FILE.
"""

from ml_collections import config_dict

from kvjax.configs import frontier


def get_config(variant: str = "") -> config_dict.ConfigDict:
    config = _uniform()
    if variant == "frontier":
        config.caches = f"dense,{frontier.caches(2, 4)}"
    elif variant:
        raise ValueError(f"variant {variant!r}; expected frontier or nothing")
    return config


def _uniform() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        tasks="needle,tracking",  # see kvjax.evaluate.suite; gsm8k(data=FOLDER) needs its two files
        caches="dense,k8v8@kivi,k4v4@kivi,k2v2@kivi",  # plans, see kvjax.caches.plan
        calibration="",  # a text that methods such as xclr2(basis=balanced) learn from; see kvjax.calibrated
        adapters="",  # a file that kvjax learn --config.what=lora left for this model
        plugins="",  # modules or Python files that register more caches, separated by commas
        dtype="float32",  # or bfloat16, float64
        mesh="",  # devices that share the model: data=2,tensor=4, see kvjax.mesh; one device where empty
        replicate="",  # logical axes that each device keeps whole, such as kv_heads
        batch=8,  # requests that are answered together
        chat=False,  # put what is asked into the model's chat template
        prefill_chunk=0,  # tokens of a prompt to be gone on from that are read at a time, all where 0
    )
