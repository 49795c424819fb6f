"""Width 16 is no approximation: logits of every X-type form against dense, relative to the largest.

    kvjax algebra --workdir=runs/algebra

gives 1e-14 or less in float64 and 3e-6 or less in float32; about five minutes on two CPU cores.
"""

from ml_collections import config_dict

CACHES = "x16@input,x16@latent(sink=4),x16@head,xcl16@input(base_bits=16),xcl16@latent(base_bits=16)"


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        models="smollm2-135m,smollm2-135m-mha",  # names, see kvjax.load
        caches=CACHES,  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        tokens=150,  # that are read in all
        chunk=50,  # tokens that are read at a time
    )
