"""The best plan for a model, a budget of bits and a text, see docs/tuning.md.

    kvjax tune --config.budget=3.25 --workdir=runs/tune

takes about two minutes on two CPU cores and leaves runs/tune/plan.yaml, which `--config.cache` and `--config.caches`
take everywhere. Other budgets and methods may share the folder: what was measured is not measured again.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        text="demo",  # to calibrate on: files, demo, wikitext-2 or hub data sets, separated by commas
        judged_on="",  # another text, which judges the chosen plan; not judged where empty
        mode="kivi",  # of the default candidates: kivi or token
        candidates="",  # caches, see kvjax.caches.plan; {2, 4, 8} bits of K and V where empty
        calibration="",  # a text that methods such as xclr2(basis=balanced) learn from; see kvjax.calibrated
        plugins="",  # modules or Python files that register more caches, separated by commas
        budget=3.25,  # bits
        budget_of="nominal",  # or asymptotic (with scales), real (all that is allocated)
        budget_context=4096,  # tokens that real bits are of
        method="knapsack",  # or nsga2, refine (the knapsack's plans of each method and of all, made better)
        by="layer",  # what chooses its candidate; head adds a plan with a choice for each kv head
        error="predicted",  # of single layers, for the knapsack: or kld (measured, slower), e_o
        prune="kl",  # candidates of a layer, for nsga2: the front of bits and KL; paper (of bits and e_o), none
        cluster="group",  # for nsga2: noise as one group, or singletons; none
        objective="kld",  # or nll, top1, agreement (of greedy answers), gsm8k
        problems="",  # GSM8K's file: agreement's prompts, gsm8k's problems
        count=20,  # problems taken
        shots=4,  # more problems, that gsm8k's prompts begin with
        context=1024,  # tokens a window
        windows=2,  # of each text
        offset=0,  # tokens skipped first
        validation=1,  # more windows of each text, which choose among the best plans
        dtype="float32",  # or bfloat16, float64
        mesh="",  # devices that share the model: data=2,tensor=4, see kvjax.mesh; one device where empty
        replicate="",  # logical axes that each device keeps whole, such as kv_heads
        points=8,  # plans of the knapsack's front that are evaluated
        trials=200,  # of nsga2
        rounds=3,  # of refine, at most
        seed=0,  # of all that is drawn
        worker=0,  # nsga2 processes that share a folder need numbers of their own
    )
