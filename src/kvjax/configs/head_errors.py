"""Why keys matter more than values: KVTuner's errors of all pairs of widths in both modes, head by head.

    kvjax head_errors --workdir=runs/head_errors

Two minutes on two CPU cores.
"""

from ml_collections import config_dict

WIDTHS = (8, 4, 2)
PAIRS = [f"k{key}v{value}@{mode}" for mode in ("token", "kivi") for key in WIDTHS for value in WIDTHS]


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # a file, demo, wikitext-2 or a hub data set
        caches=",".join(PAIRS),  # plans, see kvjax.caches.plan
        context=512,  # tokens a window
        windows=1,  # of the text
        offset=0,  # tokens skipped first
    )
