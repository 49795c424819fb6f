"""Which cache is fastest on which device, by the bytes and operations of a decode step; nothing is run.

    kvjax roofline --config=roofline:gqa --workdir=runs/roofline
    kvjax roofline --config=roofline:mha --workdir=runs/roofline

`gqa` has the shapes of Llama-3.1-8B and caches that are about as good as k4v4@kivi (docs/results.md), `mha` the
shapes of Llama-2-7B and XQuant's caches for it. Seconds each.
"""

from ml_collections import config_dict

MODELS = {
    "gqa": ("random:llama-3.1-8b", "dense,k4v4@kivi,x4@latent,x4@head,xclr3"),
    "mha": ("random:llama-2-7b", "dense,k4v4@kivi,x4@input,x4@head,xcl3@input"),
}


def get_config(which: str = "gqa") -> config_dict.ConfigDict:
    model, caches = MODELS[which]
    return config_dict.create(
        model=model,  # shapes, see kvjax.models.zoo
        devices="v5e,v6e,a100,h100,b200",  # kinds of device
        caches=caches,  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        contexts=",".join(str(2**i) for i in range(9, 18)),  # tokens of each sequence
        batch=8,  # sequences
    )
