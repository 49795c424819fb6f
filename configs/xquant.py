"""XQuant's orderings on a real model: latents and deltas against KIVI at equal bits, tokens read as they are stored.

    python -m experiments.perplexity --config=configs/xquant.py:gqa --workdir=runs/xquant-gqa
    python -m experiments.perplexity --config=configs/xquant.py:mha --workdir=runs/xquant-mha
    python -m experiments.perplexity --config=configs/xquant.py:beyond --workdir=runs/xquant-beyond

`gqa` is the model as it is, `mha` the same function with the kv heads repeated, `beyond` what was tried to do better
than the paper's form of XQuant-CL. Four to eight minutes each on two CPU cores, on WikiText-2; give
--config.text=demo for the other text.
"""

from ml_collections import config_dict

from configs import perplexity

KIVI = "k4v4@kivi(group=64),k3v3@kivi(group=64),k2v2@kivi(group=64)"
CACHES = {
    "gqa": f"dense,{KIVI},x4@latent,x3@latent,x2@latent,x4@head,x2@head,x2@latent(outlier=1),"
    "xcl4@latent,xcl3@latent,xcl2@latent,xclr3,xclr2",
    "mha": f"dense,{KIVI},x4,x3,x2,xcl4,xcl3,xcl2,xcl3(norm=pre),xcl3(fold=1),xcl3(per=channel)",
    "beyond": (
        "dense,xcl3@latent,xcl2@latent,xcl3@latent(sink=4),xcl2@latent(sink=4),"
        "xcl3@latent(sink=4,fold=1),xcl2@latent(sink=4,fold=1),"
        "xcl3@latent(sink=4,per=channel),xcl2@latent(sink=4,per=channel),"
        "xcl3@latent(sink=4,per=channel,fold=1),xcl2@latent(sink=4,per=channel,fold=1),"
        "xcl2@latent(sink=4,fold=1,rotate=1),xclr3,xclr2,"
        "xcl2@latent(group=128,sink=4,per=channel,fold=1),xcl2@latent(group=32,sink=4,per=channel,fold=1),"
        "xcl2@latent(sink=4,base=0,per=channel,fold=1),xcl2@latent(sink=4,base=1,per=channel,fold=1),"
        "xcl2@latent(sink=4,base=4,per=channel,fold=1),xcl2@latent(sink=4,base_bits=3,per=channel,fold=1),"
        "xcl2@latent(sink=4,base_bits=8,per=channel,fold=1),"
        "xclr2(base=1),xclr2(base=1,base_bits=3),xclr2(base=4,base_bits=3),xclr2(group=128),xclr2(sink=16),"
        "0-15:xclr3;16-29:xclr2,0-15:xclr2;16-29:xclr3,xclr3(base=1,base_bits=3)"
    ),
}


def get_config(variant: str = "gqa") -> config_dict.ConfigDict:
    config = perplexity.get_config()
    model = "smollm2-135m-mha" if variant == "mha" else "smollm2-135m"
    config.update(model=model, text="wikitext-2", caches=CACHES[variant], protocol="parallel")
    return config
