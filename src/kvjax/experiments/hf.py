"""HF transformers' SmolLM2, for studies that compare with it; torch and transformers are no dependencies of kvjax."""

from __future__ import annotations

from typing import Any

from kvjax.downloads import fetch
from kvjax.extras import needed
from kvjax.models import zoo


def smollm2() -> Any:
    """The float32 model of the file that kvjax reads.

    Raises:
      KvjaxError: a package is missing.
    """
    with needed("transformers"):
        import accelerate  # noqa: F401 - transformers reads GGUF files by it
        import torch
        import transformers
    file = fetch(zoo.SMOLLM2)
    model: Any = transformers.AutoModelForCausalLM
    return model.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def versions() -> dict[str, str]:
    """Of the packages, for rows."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
