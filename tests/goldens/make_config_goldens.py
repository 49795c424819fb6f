"""Makes config-goldens.npz and config-keys.json: what transformers computes for every case of config_cases.py.

Needs torch and transformers (not installed with kvjax). From the root of the repository:

    python -m tests.goldens.make_config_goldens

The first file holds logits [KEPT, COLUMNS] by "FAMILY/CASE", the second the keys that transformers itself writes
into the config.json of each family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tests.goldens.config_cases import CASES, COLUMNS, FOLDERS, KEPT, SAME, config_of, tokens, weight

HERE = Path(__file__).parent


def logits(family: str, changes: dict[str, Any]) -> np.ndarray:
    options = config_of(family, changes)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
        return model(torch.from_numpy(tokens())).logits[0, -KEPT:, :COLUMNS].numpy()


def main() -> None:
    found = {f"{family}/{name}": logits(family, each) for family in CASES for name, each in CASES[family].items()}
    for family, cases in SAME.items():
        for name, (other, changes) in cases.items():
            same = np.array_equal(logits(family, changes), found[f"{family}/{other}"])
            assert same, f"{family}: {name} is not {other}"
    np.savez_compressed(HERE / "config-goldens.npz", **found)
    keys = {family: sorted(transformers.AutoConfig.for_model(family).to_dict()) for family in (*CASES, *FOLDERS)}
    (HERE / "config-keys.json").write_text(json.dumps(keys, indent=1) + "\n")


if __name__ == "__main__":
    main()
