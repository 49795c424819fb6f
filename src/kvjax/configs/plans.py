"""Searched plans at several budgets against uniform caches, on texts that the search never saw, see docs/tuning.md.

    kvjax plans --workdir=runs/plans
    kvjax plans --config=plans:widths --workdir=runs/widths
    kvjax plans --config=plans:families --workdir=runs/families
    kvjax plans --config=plans:forms --workdir=runs/families
    kvjax plans --config=plans:heads --workdir=runs/heads

The first compares KVTuner's pairs in both modes with the uniform pairs that fit each budget, the second those of 2 to
6 bits; the third searches key-value pairs, latents of X and XQuant-CL alone and together, all in their better forms,
with 4 exact sinks and 64 tokens of residual; the fourth XQuant-CL with other groups and base layers among what is
searched; the fifth compares a choice for each kv head with one for each layer. Calibrated on the demo essays and
judged on WikiText-2's test split. To judge on both, calibrate on a third text: --config.text=FILE
--config.judged_on=wikitext-2,demo.
"""

from ml_collections import config_dict

from kvjax.configs import tune

WIDTHS = (2, 3, 4, 5, 6, 8)
DELTAS = (1, 2, 3, 4, 6)  # each is measured on each


def pairs(mode: str, widths: tuple[int, ...]) -> str:
    return ",".join(f"k{k}v{v}@{mode}" for k in widths for v in widths)


FAMILIES = {
    "K and V": ",".join(f"kr{k}v{v}(residual=64)" for k in (2, 3, 4, 8) for v in (2, 3, 4, 8)),
    "X latents": ",".join(f"x{b}@latent(residual=64,sink=4,rotate=1)" for b in WIDTHS),
    "XQuant-CL": ",".join(f"xclr{b}(residual=64,base={base})" for base in (0, 2) for b in DELTAS),
}
FORMS = ",".join(
    f"xclr{b}(group={group},base=0,base_bits={base_bits})"
    for group in (64, 128)
    for base_bits in (3, 4)
    for b in DELTAS
)
CANDIDATES = {
    "pairs": {"kivi": pairs("kivi", (2, 4, 8)), "token": pairs("token", (2, 4, 8))},
    "widths": {"kivi, 2 to 6 bits": pairs("kivi", WIDTHS[:5]), "token, 2 to 6 bits": pairs("token", WIDTHS[:5])},
    "families": FAMILIES | {"all three": ",".join(FAMILIES.values())},
    "forms": {"XQuant-CL, groups and bases": FORMS},
}
SEARCHES = {
    variant: {name: {"candidates": text} for name, text in searches.items()}
    for variant, searches in CANDIDATES.items()
}
SEARCHES["heads"] = {f"by {by}": {"candidates": CANDIDATES["pairs"]["kivi"], "by": by} for by in ("layer", "head")}
FAIR = "2.25,2.5,3,3.25,3.5,4,4.5"
BUDGETS = {"pairs": "3,3.25,3.5,4,4.5,5,6", "widths": "3,4", "families": FAIR, "forms": FAIR, "heads": "3,3.5,4,5"}


def get_config(variant: str = "pairs") -> config_dict.ConfigDict:
    config = tune.get_config()
    config.update(text="demo", windows=1, method="refine")
    config.update(budget_of="asymptotic" if variant in ("families", "forms") else "nominal")
    config.update(
        {
            "searches": SEARCHES[variant],  # by its name, what each search has beside these fields
            "budgets": BUDGETS[variant],  # bits, separated by commas
            "judged_on": "wikitext-2",  # texts that are not calibrated on, separated by commas
            "judged_windows": 4,  # of each text, of `context` tokens
        }
    )
    return config
