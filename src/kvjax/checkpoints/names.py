"""Names of tensors as they come in the wild, mapped to those that HF writes."""

from __future__ import annotations

from collections.abc import Iterable

from kvjax.errors import KvjaxError

ROOTS = ("embed_tokens", "layers", "norm", "lm_head")  # where the decoder's own part of a name begins
# What training, compilation, adapters and multimodal models put before it or between its parts.
WRAPPERS = ("model", "module", "base_model", "language_model", "text_model", "transformer", "llm", "decoder")
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Parts of names that tell weights in another form.
FORMS = {
    **dict.fromkeys(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), "part of a LoRA adapter"),
    **dict.fromkeys(("qweight", "qzeros", "g_idx"), "part of a GPTQ or AWQ weight"),
    **dict.fromkeys(("absmax", "quant_map", "nested_absmax", "quant_state", "SCB"), "part of a bitsandbytes weight"),
    **dict.fromkeys(("weight_scale", "weight_scale_inv", "weight_packed"), "part of a quantised weight"),
    **dict.fromkeys(("input_scale", "scales", "biases"), "part of a quantised weight"),
}


def canonical(name: str) -> str:
    """Strips wrappers from a tensor's name.

    Args:
      name: the name in the file, such as `base_model.model.model.layers.0._orig_mod.mlp.up_proj.weight`.

    Returns:
      HF's name, such as `model.layers.0.mlp.up_proj.weight`; the name itself where it is no decoder's.
    """
    parts = [part for part in name.split(".") if part not in INSIDE]
    root = next((i for i, part in enumerate(parts) if part in ROOTS), None)
    if root is None or any(part not in WRAPPERS for part in parts[:root]):
        return name
    own = ".".join(parts[root:])
    return own if parts[root] == "lm_head" else f"model.{own}"


def check_forms(names: Iterable[str]) -> None:
    """Checks that the tensors are plain weights of a whole model.

    Args:
      names: all names in the files.

    Raises:
      KvjaxError: one is part of an adapter, or of weights quantised by some tool.
    """
    for name in names:
        for part in name.split("."):
            if part in FORMS:
                expected = "an adapter merged into its model" if "lora" in part else "float weights"
                raise KvjaxError(f"tensor {name} is {FORMS[part]}; expected {expected}")
