"""Damaged files and odd things that people type: a result, or one clear line.

    python -m tests.robustness.fuzz --config=tests/robustness/fuzz_config.py --workdir=runs/fuzz

gives no "other" outcome; about ten minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        models="tests/goldens",  # folders of tiny models, of which copies are damaged
        tries=1000,  # of each kind of input
        seconds=60.0,  # that one may take; some compile, on machines that have more to do
    )
