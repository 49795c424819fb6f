"""KVTuner's search against the knapsack: hypervolume by evaluations of the model, see docs/tuning.md.

    python -m experiments.searches --config=configs/searches.py --workdir=runs/searches

runs NSGA-II for 200 trials with pruning and clustering and without (the paper's figure 6), and the knapsack over
predicted errors: about twenty minutes on two CPU cores.
"""

from ml_collections import config_dict

from configs import tune


def get_config() -> config_dict.ConfigDict:
    config = tune.get_config()
    config.update(context=512, windows=1, budget=6.0, points=16)
    return config
