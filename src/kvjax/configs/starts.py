"""What kept programs save: a start of kvjax generate with an empty and with a filled $KVJAX_CACHE.

    kvjax starts --workdir=runs/starts

runs it twice for each cache, in processes of their own: three minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        model="smollm2-135m",  # a name of kvjax.models.zoo
        caches="dense,k4v4,k4v2@kivi",  # plans, see kvjax.caches.plan
        max_new_tokens=16,  # that are generated at most
    )
