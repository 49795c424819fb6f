"""Damaged checkpoints, plans, results and texts: loaded, or refused with one clear line.

    python -m tests.robustness.fuzz --config=tests/robustness/fuzz_config.py --workdir=runs/fuzz

gives no "other" outcome; about half a minute on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        models="tests/goldens",  # folders of tiny models, of which copies are damaged
        tries=1000,  # of each kind of input
        seconds=20.0,  # that one may take
    )
