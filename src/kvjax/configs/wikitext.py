"""The reference values: 28 caches on the first four windows of WikiText-2, every token read as it is stored.

    kvjax sweep --config=wikitext --workdir=runs/wikitext
    kvjax sweep --config=wikitext:float64 --workdir=runs/wikitext64

Dense gives nll 3.1395 (perplexity 23.09), k4v4@kivi KL .0158 and k2v2@kivi KL .656 in float64; about eight minutes on
two CPU cores, twenty in float64. Give --config.text=FILE where the hub is out of reach.
"""

from ml_collections import config_dict

from kvjax.configs import perplexity

CACHES = (
    "dense,k8v8@token,k8v4@token,k4v4@token,k4v2@token,k2v2@token,k8v8@kivi,k4v4@kivi,k4v2@kivi,k2v2@kivi,"
    "k4v4@kivi(rope=pre),k2v2@kivi(rope=pre),"
    "x8@input,x4@input,x3@input,x2@input,x4@latent,x3@latent,x2@latent,x4@head,x3@head,x2@head,"
    "xcl4@input,xcl3@input,xcl2@input,xcl4@latent,xcl3@latent,xcl2@latent"
)


def get_config(dtype: str = "float32") -> config_dict.ConfigDict:
    config = perplexity.get_config()
    config.update(text="wikitext-2", caches=CACHES, protocol="parallel", dtype=dtype)
    return config
