"""Bad input of every kind, given to the programs: one clear line each, and nothing half-written.

    python -m tests.robustness.bad_input --config=tests/robustness/bad_input_config.py --workdir=runs/bad_input

gives no faults; about six minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        models="tests/goldens",  # folders of tiny models, of which copies are used
        seconds=120.0,  # that one case may take
    )
