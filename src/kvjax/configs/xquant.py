"""XQuant's orderings on a real model: latents and deltas against KIVI at equal bits, tokens read as they are stored.

    kvjax sweep --config=xquant:gqa --workdir=runs/xquant-gqa
    kvjax sweep --config=xquant:mha --workdir=runs/xquant-mha
    kvjax sweep --config=xquant:equal --workdir=runs/xquant-equal
    kvjax sweep --config=xquant:equal-mha --workdir=runs/xquant-equal-mha
    kvjax sweep --config=xquant:beyond --workdir=runs/xquant-beyond

`gqa` is the model as it is, `mha` the same function with the kv heads repeated. `equal` and `equal-mha` have the
paper's own baseline, KIVI with keys before RoPE (and after it, to tell what that is worth), and layers 0 to 2 of
every method in 4 bits. Beyond the paper, all methods share groups of 64, 4 exact sinks and a residual of 64 tokens.
`beyond` is what was tried to do better than the paper's form of XQuant-CL. Four to fifteen minutes each on two CPU
cores, on WikiText-2; give --config.text=demo for the other text.
"""

from ml_collections import config_dict

from kvjax.configs import perplexity

LAYERS = 30  # of the model


def first_layers_in_4_bits(method: str) -> str:
    """The method, {b} its bits, in 4, 3 and 2 bits above three layers of 4."""
    name = lambda bits: method.replace("{b}", str(bits))  # noqa: E731
    return ",".join([name(4), *(f"0-2:{name(4)};3-{LAYERS - 1}:{name(bits)}" for bits in (3, 2))])


def equal(mode: str) -> str:
    """Every family with the same sinks, residual, groups and first layers; XQuant-CL's own base is layer 2."""
    each = ("k{b}v{b}@kivi(group=64,sink=4)", "k{b}v{b}@kivi(group=64,sink=4,rope=pre)", f"x{{b}}@{mode}(FIELDS)")
    deltas = ",".join(f"xcl{bits}@{mode}(FIELDS)" for bits in (4, 3, 2))
    plans = ",".join(["dense", *map(first_layers_in_4_bits, each), deltas, "xclr3(fit=minmax),xclr2(fit=minmax)"])
    return plans.replace("FIELDS", "group=64,residual=64,sink=4")


KIVI = "k4v4@kivi(group=64),k3v3@kivi(group=64),k2v2@kivi(group=64)"
CACHES = {
    "gqa": f"dense,{KIVI},x4@latent,x3@latent,x2@latent,x4@head,x2@head,x2@latent(outlier=1),"
    "xcl4@latent,xcl3@latent,xcl2@latent,xclr3(fit=minmax),xclr2(fit=minmax)",
    "mha": f"dense,{KIVI},x4,x3,x2,xcl4,xcl3,xcl2,xcl3(norm=pre),xcl3(fold=1),xcl3(per=channel)",
    "equal": equal("latent"),
    "equal-mha": equal("input"),
    "beyond": (
        "dense,xcl3@latent,xcl2@latent,xcl3@latent(sink=4),xcl2@latent(sink=4),"
        "xcl3@latent(sink=4,fold=1),xcl2@latent(sink=4,fold=1),"
        "xcl3@latent(sink=4,per=channel),xcl2@latent(sink=4,per=channel),"
        "xcl3@latent(sink=4,per=channel,fold=1),xcl2@latent(sink=4,per=channel,fold=1),"
        "xcl2@latent(sink=4,fold=1,rotate=1),xclr3(fit=minmax),xclr2(fit=minmax),"
        "xcl2@latent(group=128,sink=4,per=channel,fold=1),xcl2@latent(group=32,sink=4,per=channel,fold=1),"
        "xcl2@latent(sink=4,base=0,per=channel,fold=1),xcl2@latent(sink=4,base=1,per=channel,fold=1),"
        "xcl2@latent(sink=4,base=4,per=channel,fold=1),xcl2@latent(sink=4,base_bits=3,per=channel,fold=1),"
        "xcl2@latent(sink=4,base_bits=8,per=channel,fold=1),"
        "xclr2(base=1,fit=minmax),xclr2(base=1,base_bits=3,fit=minmax),xclr2(base=4,base_bits=3,fit=minmax),"
        "xclr2(group=128,fit=minmax),xclr2(sink=16,fit=minmax),0-15:xclr3(fit=minmax);16-29:xclr2(fit=minmax),"
        "0-15:xclr2(fit=minmax);16-29:xclr3(fit=minmax),xclr3(base=1,base_bits=3,fit=minmax)"
    ),
}


def get_config(variant: str = "gqa") -> config_dict.ConfigDict:
    config = perplexity.get_config()
    model = "smollm2-135m-mha" if variant.endswith("mha") else "smollm2-135m"
    config.update(model=model, text="wikitext-2", caches=CACHES[variant], protocol="parallel")
    return config
