"""The methods that people compare, at equal conditions and as their authors run them.

    kvjax quality --config=frontier --config.calibration=FILE --workdir=runs/frontier
    kvjax quality --config=frontier:authors --config.calibration=FILE --workdir=runs/own

The first gives no method an exact token (`stored`), then all of them 4 sinks and 128 recent tokens (`exact`); the
second has each in the settings of its authors (docs/methods). All are compared with the same control: keys and
values turned by a Hadamard matrix, with fitted scales. Methods that learn do so from FILE, a text that is not judged.
About two minutes a method on two CPU cores; what is done already is not done again.
"""

from ml_collections import config_dict

from kvjax.configs import quality

CONTROL = "k{b}v{b}@token(rotate=hadamard,fit=mse)"
METHODS = (
    "k{b}v{b}@token",
    "k{b}v{b}@kivi",
    "k{b}v{b}@kivi(fit=unbiased,rotate=values)",
    "tq{b}v{b}",
    "oscar{b}",
    "kvarn{b}v{b}",
    "gear{b}",
    "kvquant{b}",
    "aqua{b}",
    "x{b}@latent(rotate=1,basis=balanced)",
    "xcl{b}@latent",
    "xcl{b}@latent(per=channel,fold=1,rotate=1,fit=mse,basis=balanced,gain=1)",
)
CONDITIONS = {
    "equal": {"stored": ("parallel", "sink=0"), "exact": ("streaming", "residual=128,sink=4")},
    "authors": {"authors": ("streaming", "")},
}


def get_config(variant: str = "equal") -> config_dict.ConfigDict:
    config = quality.get_config()
    config.update(study="frontier" if variant == "equal" else "frontier-authors", contexts="1024,8192,131072")
    config.conditions = config_dict.ConfigDict(CONDITIONS[variant])
    config.families = config_dict.ConfigDict({"methods": (CONTROL, METHODS)})
    return config


def caches(*widths: int) -> str:
    """All methods with equal exact tokens, for programs that take a list of caches.

    Args:
      widths: bits of what they store.
    """
    _, exact = CONDITIONS["equal"]["exact"]
    return ",".join(quality.named(CONTROL, form, bits, exact) for bits in widths for form in ("", *METHODS))
