"""KVTuner's search against the knapsack: five seeds, equal evaluations, judged on an unseen text, see docs/tuning.md.

    kvjax searches --config.text=FILE --workdir=runs/searches

runs NSGA-II with pruning and clustering and without (the paper's figure 6), and the knapsack over predicted KL and
over e_o: about two hours on two CPU cores. A run that was cut off goes on. `--config.seeds=1` takes a fifth of it.
"""

from ml_collections import config_dict

from kvjax.configs import tune


def get_config() -> config_dict.ConfigDict:
    config = tune.get_config()
    config.update(context=512, windows=1, budget=6.0)
    config.update(judged_on="wikitext-2", trials=200)  # trials: evaluations of every search, sensitivity counted
    config.update(
        {
            "seeds": 5,  # from `seed` on
            "judged_windows": 4,  # of each judged text
            "judged_budgets": "3,4,5,6",  # bits, for each of which a search chooses a plan
        }
    )
    return config
