"""Perplexity and KL divergence of cache plans on one text.

    kvjax sweep --workdir=runs/sweep

scores a 135M-parameter model on four windows of 1024 tokens of the demo text under seven caches: about five minutes
on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        caches="dense,k8v8@token,k4v4@token,k8v4@kivi,k4v4@kivi,k4v2@kivi,k2v2@kivi",  # plans, see kvjax.caches.plan
        calibration="",  # a text that methods such as xclr2(basis=balanced) learn from; see kvjax.calibrated
        adapters="",  # a file that kvjax learn --config.what=lora left for this model
        plugins="",  # modules or Python files that register more caches, separated by commas
        protocol="streaming",  # streaming, decode or parallel, see kvjax.evaluate.perplexity
        dtype="float32",  # or bfloat16, float64
        mesh="",  # devices that share the model: data=2,tensor=4, see kvjax.mesh; one device where empty
        replicate="",  # logical axes that each device keeps whole, such as kv_heads
        over="devices",  # which several processes share; or plans, of which each process takes its own
        context=1024,  # tokens a window
        windows=4,  # of the text
        offset=0,  # tokens skipped first
    )
