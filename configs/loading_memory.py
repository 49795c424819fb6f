"""Memory and disk reads of loading a checkpoint of Llama-3.2-1B's shapes, on one device and on eight of CPU.

    python -m experiments.loading_memory --config=configs/loading_memory.py --workdir=runs/loading_memory

writes a checkpoint of random weights there (2.5 GB) and needs up to 7 GB of memory; two minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        vocab_size=128256,
        model_dim=2048,
        mlp_dim=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        files=4,  # safetensors files of the checkpoint
        dtype="bfloat16",  # of the loaded parameters; the files hold bfloat16
        mesh="data=2,tensor=4",  # of the second measurement
        devices=8,  # of CPU, for it
    )
