"""Every family of caches at equal conditions: its forms against its plain one, with the same exact tokens.

    kvjax quality --config.texts=wikitext-2,demo --workdir=runs/quality

`stored` gives no family an exact token: no sinks, and each token is read as it is stored (protocol parallel). `exact`
gives all of them 4 sinks and a residual of 64 tokens, read as decoding reads them (protocol streaming). Two hours
on two CPU cores; what is done already is not done again. The first tokens of both texts are left out, because other
studies choose by them.
"""

from ml_collections import config_dict

from kvjax.configs import perplexity

CONDITIONS = {"stored": ("parallel", ""), "exact": ("streaming", "residual=64,sink=4")}  # protocol, fields
FAMILIES = {  # a family's plain form, {b} its bits, and the fields of its other forms
    "K and V per token": ("k{b}v{b}@token", ("fit=keys", "fit=mse", "rotate=hadamard", "fit=mse,rotate=hadamard")),
    "KIVI": (
        "k{b}v{b}@kivi",
        ("fit=keys", "fit=mse", "fit=unbiased,rotate=values", "fit=unbiased,rotate=values,scale=8"),
    ),
    "KIVI before RoPE": ("k{b}v{b}@kivi(rope=pre)", ("fit=keys", "fit=unbiased,rotate=values")),
    "X latents": ("x{b}@latent", ("fit=mse", "rotate=1", "fit=mse,rotate=1", "fit=unbiased,rotate=1")),
    "XQuant-CL per token": ("xcl{b}@latent", ("fit=mse",)),
    "XQuant-CL per channel": (
        "xcl{b}@latent(per=channel)",
        ("fit=mse", "fold=1,rotate=1", "fit=mse,fold=1,rotate=1", "fit=mse,fold=1,rotate=1,scale=8"),
    ),
}


def get_config() -> config_dict.ConfigDict:
    config = perplexity.get_config()
    for key in ("text", "caches", "protocol", "over"):
        del config[key]
    config.update(
        {
            "study": "quality",  # names the files
            "texts": "wikitext-2,demo",  # that are judged
            "conditions": CONDITIONS,  # by name: the protocol, and fields of all forms
            "families": FAMILIES,  # by name: the plain form, and fields of the others
            "bits": "4,3,2",  # widths, separated by commas
            "contexts": "1024,8192",  # for which bits are counted
            "windows": 4,
            "offset": 20480,
        }
    )
    return config


def named(plain: str, form: str, bits: int, exact: str) -> str:
    """The cache of a form.

    Args:
      plain: the family's plain cache, {b} its bits.
      form: fields that it has more, or another cache where {b} is in it.
      bits: of what it stores.
      exact: fields that a condition gives to all.
    """
    base, more = (form, "") if "{b}" in form else (plain, form)
    name, _, own = base.replace("{b}", str(bits)).rstrip(")").partition("(")
    inside = ",".join(filter(None, (own, exact, more)))
    return f"{name}({inside})" if inside else name
