"""HF transformers' SmolLM2, for studies that compare with it; torch and transformers are no dependencies of kvjax."""

from __future__ import annotations

from typing import Any

from kvjax.downloads import fetch
from kvjax.errors import KvjaxError
from kvjax.models import zoo


def smollm2() -> Any:
    """The float32 model of the file that kvjax reads.

    Raises:
      KvjaxError: a package is missing.
    """
    try:
        import accelerate  # noqa: F401 - transformers reads GGUF files by it
        import torch
        import transformers
    except ImportError as error:
        needed = "torch, transformers and accelerate"
        raise KvjaxError(f"{error.name} is not installed; this comparison needs {needed}") from None
    file = fetch(zoo.SMOLLM2)
    model: Any = transformers.AutoModelForCausalLM
    return model.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def versions() -> dict[str, str]:
    """Of the packages, for rows."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
