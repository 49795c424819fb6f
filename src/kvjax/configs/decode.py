"""One decode step at depth: milliseconds and temporary memory of every cache, in one interleaved run.

    kvjax decode --workdir=runs/decode

    kvjax decode --config=decode:latents --workdir=runs/latents
    kvjax decode --config=decode:mixed --workdir=runs/mixed
    kvjax decode --config=decode:forms --workdir=runs/forms
    kvjax decode --config=decode:rivals --workdir=runs/rivals

prefills 7900 tokens of the demo text into each cache of a 135M-parameter model, then times single steps in turn:
about eight minutes on two CPU cores. `dense` runs twice, with keys and values in float32 and in bfloat16. The second
form is for caches that rebuild keys, at depth 4096; the third for a searched plan and the uniform ones it is made of;
the fourth for plain and better forms side by side; the fifth for the frontier's methods at 4 bits, with equal exact
tokens.
"""

from ml_collections import config_dict

SEARCHED = (  # for 3.25 bits, see docs/tuning.md
    "0+6+11+28-29:k2v2@kivi;1+8+12+14-15+17-21+23-24:k4v4@kivi;2-5+7+9-10+13+16+22+25-27:k4v2@kivi"
)


FORMS = (
    "dense,k4v4@token,k4v4@token(fit=mse,rotate=hadamard),k4v4@kivi,kr4v4,k4v4@kivi(rotate=hadamard),"
    "x4@latent,x4@latent(fit=unbiased,rotate=1),xcl3@latent(per=channel),xclr3"
)
RIVALS = (
    "dense,k4v4@token(residual=128,sink=4),k4v4@token(residual=128,sink=4,fit=mse,rotate=hadamard),"
    "k4v4@kivi(residual=128,sink=4),tq4v4(residual=128,sink=4),oscar4(residual=128,sink=4),kvarn4v4(sink=4),"
    "gear4(residual=128,sink=4),kvquant4(residual=128,sink=4),aqua4,"
    "x4@latent(residual=128,sink=4,rotate=1,basis=balanced),xcl4@latent(residual=128,sink=4)"
)


def get_config(variant: str = "") -> config_dict.ConfigDict:
    config = _packed()
    if variant == "latents":
        caches = "dense,k4v4@kivi,x4@latent,x4@head,x4@input,xcl3@latent"
        config.update(caches=caches, rebuild="x4@latent,x4@head", depth=4096, max_len=4352)
    elif variant == "mixed":
        config.update(
            caches=f"dense,k8v4@kivi,k4v4@kivi,k4v2@kivi,k2v2@kivi,{SEARCHED}", depth=4096, max_len=4352, steps=40
        )
    elif variant == "forms":
        config.update(caches=FORMS, depth=4096, max_len=4352, steps=132)
    elif variant == "rivals":
        config.update(caches=RIVALS, calibration="demo", depth=4096, max_len=4352)
    elif variant:
        raise ValueError(f"variant {variant!r}; expected latents, mixed, forms, rivals or nothing")
    return config


def _packed() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        caches="dense,k8v8@token,k4v4@token,k2v2@token,k4v4@kivi,k4v2@kivi,k2v2@kivi",  # plans, see kvjax.caches.plan
        calibration="",  # a text that methods such as aqua4 learn from; see kvjax.calibrated
        plugins="",  # modules or Python files that register more caches, separated by commas
        rebuild="",  # of X-type caches: timed with values rebuilt, too
        dtype="float32",  # of the weights
        depth=7900,  # tokens in the cache before the first timed step
        max_len=8192,  # tokens allocated
        steps=25,  # timed steps of each cache
    )
