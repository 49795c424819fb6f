"""Width 16 is no approximation: logits of every X-type form against dense, relative to the largest.

    kvjax algebra --workdir=runs/algebra

gives 1e-14 or less in float64 and 3e-6 or less in float32; about five minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        text="demo",
        models="smollm2-135m,smollm2-135m-mha",
        caches="x16@input,x16@latent(sink=4),x16@head,xcl16@input(base_bits=16),xcl16@latent(base_bits=16)",
        plugins="",  # modules or Python files that register more caches, separated by commas
        tokens=150,
        chunk=50,
    )
