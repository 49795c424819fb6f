"""Streaming against decode, per token, on a ragged batch in float64 and float32.

    kvjax protocols --workdir=runs/protocols

    kvjax protocols --config=protocols:latents --workdir=runs/protocols

give differences of 1e-12 or less in float64; about four minutes each on two CPU cores.
"""

from ml_collections import config_dict

PACKED = "k4v4@kivi,k4v2@token,k4v4@kivi(sink=4),0-9:k8v4@kivi;10-19:k4v2@token(sink=4);20-29:k2v3@kivi(rope=pre)"
LATENTS = "x4@latent,x4@head,x4@input,xcl3@latent,xcl3@input"


def get_config(variant: str = "packed") -> config_dict.ConfigDict:
    caches, lengths = {"packed": (PACKED, "96,71"), "latents": (LATENTS, "180,131")}[variant]
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        caches=caches,  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        lengths=lengths,  # tokens of each sequence
    )
