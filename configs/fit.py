"""Fitted scales (`fit`) against minimum and maximum at equal bytes, family by family, on one text.

    python -m experiments.perplexity --config=configs/fit.py --workdir=runs/fit
    python -m experiments.perplexity --config=configs/fit.py --config.text=wikitext-2 --config.offset=8192 \
        --workdir=runs/fit

Two windows of 512 tokens, every token read as it is stored: fifteen minutes each on two CPU cores. The first tokens
of both texts are left out, because other studies choose by them.
"""

from ml_collections import config_dict

from configs import perplexity

KEYS_AND_VALUES = ("", "fit=keys", "fit=mse", "fit=unbiased")
ONE_TENSOR = ("", "fit=mse")


def each(method: str, fields: str, fits: tuple[str, ...]) -> list[str]:
    """The method with its fields and each of the fits."""
    settings = (",".join(filter(None, (fields, fit))) for fit in fits)
    return [f"{method}({inside})" if inside else method for inside in settings]


CACHES = [
    "dense",
    *each("xcl2@latent", "", ONE_TENSOR),
    *each("xcl2@latent", "sink=4,per=channel,fold=1,rotate=1", ONE_TENSOR),
    *each("xcl2@latent", "group=128,sink=4,per=channel,fold=1,rotate=1", ONE_TENSOR),
    *each("xcl2@latent", "sink=4,scale=8,per=channel,fold=1,rotate=1", ONE_TENSOR[1:]),
    *each("k2v2@kivi", "", KEYS_AND_VALUES),
    *each("k2v2@kivi", "sink=4", KEYS_AND_VALUES),
    *each("k2v2@kivi", "sink=4,rope=pre", KEYS_AND_VALUES[:2]),
    *each("k2v2@kivi", "sink=4,rotate=values", KEYS_AND_VALUES[1:]),
    *each("k2v2@kivi", "sink=4,scale=8,rotate=values", KEYS_AND_VALUES[-1:]),
    *each("x2@latent", "", KEYS_AND_VALUES),
    *each("x2@latent", "sink=4,rotate=1", KEYS_AND_VALUES),
]


def get_config() -> config_dict.ConfigDict:
    config = perplexity.get_config()
    config.update(caches=",".join(CACHES), protocol="parallel", context=512, windows=2, offset=20480)
    return config
