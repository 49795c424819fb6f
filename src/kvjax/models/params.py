"""The decoder's parameter tree: its shapes, and how it is built from the named tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.mesh import ONE_DEVICE, Index, Layout, check, part_nbytes
from kvjax.models.config import ModelConfig

Params = dict[str, Any]
ParamPath = tuple[str, ...]  # ("embed",) or ("layer_0", "q")
Shape = tuple[int, ...]
# Logical axes, as Megatron divides them: each device has whole heads, hidden units of the MLP and words; sums over
# devices follow o and down.
AXES: Mapping[str, PartitionSpec] = {
    **dict.fromkeys(("embed", "head"), PartitionSpec("vocab", None)),
    "q": PartitionSpec("heads", None),
    **dict.fromkeys(("k", "v"), PartitionSpec("kv_heads", None)),
    "o": PartitionSpec(None, "heads"),
    **dict.fromkeys(("gate", "up"), PartitionSpec("mlp", None)),
    "down": PartitionSpec(None, "mlp"),
    **dict.fromkeys(("q_bias", "sinks"), PartitionSpec("heads")),
    **dict.fromkeys(("k_bias", "v_bias"), PartitionSpec("kv_heads")),
    **dict.fromkeys(("gate_bias", "up_bias"), PartitionSpec("mlp")),
    # Every device has a part of each expert.
    **dict.fromkeys(("expert_gate", "expert_up"), PartitionSpec(None, "mlp", None)),
    "expert_down": PartitionSpec(None, None, "mlp"),
    **dict.fromkeys(("expert_gate_bias", "expert_up_bias"), PartitionSpec(None, "mlp")),
}


def param_shapes(config: ModelConfig) -> dict[ParamPath, Shape]:
    """Lists the shape of every parameter of `Decoder(config)`.

    Args:
      config: the decoder's config.

    Returns:
      Shapes by path, weights as [out, in].
    """
    c = config
    shapes: dict[ParamPath, Shape] = {("embed",): (c.vocab_size, c.model_dim), ("norm",): (c.model_dim,)}
    if not c.tied:
        shapes["head",] = (c.vocab_size, c.model_dim)
    return shapes | {(f"layer_{i}", name): shape for i in range(c.layers) for name, shape in layer_shapes(c).items()}


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Lists the shape of every parameter of a layer, by name."""
    c = config
    q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim
    before, after = (["attention", "mlp"] * there for there in (c.pre_norm, c.post_norm))
    shapes: dict[str, Shape] = {
        **{f"{name}_norm": (c.model_dim,) for name in before},
        **{f"{name}_post_norm": (c.model_dim,) for name in after},
        "q": (q_dim, c.model_dim),
        "k": (kv_dim, c.model_dim),
        "v": (kv_dim, c.model_dim),
        "o": (c.model_dim, q_dim),
    }
    if c.qkv_bias:
        shapes |= {"q_bias": (q_dim,), "k_bias": (kv_dim,), "v_bias": (kv_dim,)}
    if c.o_bias:
        shapes["o_bias"] = (c.model_dim,)
    if c.qk_norm:
        shapes |= {name: (width,) for name, width in zip(("q_norm", "k_norm"), c.qk_norm_widths, strict=True)}
    if c.learned_sinks:
        shapes["sinks"] = (c.heads,)
    return shapes | _mlp_shapes(c)


def _mlp_shapes(config: ModelConfig) -> dict[str, Shape]:
    c = config
    shapes: dict[str, Shape] = {
        "gate": (c.mlp_dim, c.model_dim),
        "up": (c.mlp_dim, c.model_dim),
        "down": (c.model_dim, c.mlp_dim),
    }
    if c.mlp_bias:
        shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
    if not c.experts:
        return shapes
    router: dict[str, Shape] = {"router": (c.experts, c.model_dim)}
    if c.mlp_bias:
        router["router_bias"] = (c.experts,)
    return router | {f"expert_{name}": (c.experts, *shape) for name, shape in shapes.items()}


def param_axes(path: ParamPath) -> PartitionSpec:
    """Logical axes of a parameter; norms and biases of the residual stream are whole everywhere."""
    return AXES.get(path[-1], PartitionSpec())


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Raises KvjaxError where a mesh would cut heads, or divides the MLP or the vocabulary unevenly."""
    layout.check(**_divided(config))


def _divided(config: ModelConfig) -> dict[str, int]:
    """What meshes divide, and its size."""
    return {"heads": config.heads, "kv_heads": config.kv_heads, "mlp": config.mlp_dim, "vocab": config.vocab_size}


def param_nbytes(
    config: ModelConfig, dtype: DTypeLike, mesh: Mesh | AbstractMesh, replicate: Sequence[str] = ()
) -> int:
    """Bytes of a decoder's parameters that each device holds.

    Args:
      config: the decoder's config.
      dtype: dtype of the parameters.
      mesh: the mesh.
      replicate: logical axes that are kept whole.

    Raises:
      KvjaxError: the mesh does not divide the model.
    """
    check(mesh, _divided(config), replicate)
    shapes = param_shapes(config)
    arrays = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
    return part_nbytes(mesh, {path: param_axes(path) for path in shapes}, arrays, replicate)


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of the parameters in one checkpoint format; `{i}` in `prefix` stands for the layer."""

    top: Mapping[str, str]
    prefix: str
    layer: Mapping[str, str]

    def of(self, path: ParamPath) -> str:
        if len(path) == 1:
            return self.top[path[0]]
        return self.prefix.format(i=path[0].removeprefix("layer_")) + self.layer[path[1]]


def check_tensors(config: ModelConfig, name_of: Callable[[ParamPath], str], present: Mapping[str, Shape]) -> None:
    """Checks that a checkpoint has exactly the tensors of a decoder.

    Args:
      config: the decoder's config.
      name_of: the checkpoint's name for a parameter path.
      present: the shape of every tensor of the checkpoint, by name.

    Raises:
      KvjaxError: a tensor is missing, has another shape, or would be ignored by the decoder.
    """
    if config.layers > len(present):  # checked before anything is allocated for so many layers
        raise KvjaxError(f"the config has {config.layers} layers, but there are {len(present)} tensors in all")
    names = {name_of(path): shape for path, shape in param_shapes(config).items()}
    for name, shape in names.items():
        if name not in present:
            raise KvjaxError(f"tensor {name} is missing; expected shape {shape}")
        if present[name] != shape:
            raise KvjaxError(f"tensor {name} has shape {present[name]}; expected {shape}")
    if extra := sorted(present.keys() - names.keys()):
        raise KvjaxError(f"tensor {extra[0]} is not part of a {config.family} decoder; found {len(extra)} such")


def build_params(
    config: ModelConfig,
    names: Names,
    present: Mapping[str, Shape],
    read: Callable[[ParamPath, str, Index], np.ndarray],
    dtype: DTypeLike,
    layers: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[ModelConfig, Params]:
    """Builds the parameter tree of a checkpoint.

    All names and shapes are checked first; then the tensors are read one by one.

    Args:
      config: config of the whole checkpoint.
      names: the checkpoint's names of parameters.
      present: the shape of every tensor of the checkpoint, by name.
      read: returns values of the tensor with this path and name, those at an index.
      dtype: dtype of the parameters.
      layers: how many layers to keep, from the first; all where None.
      layout: where the parameters live. Each device's part is read alone.

    Returns:
      The config and the parameters of the layers that are kept.

    Raises:
      KvjaxError: the tensors do not fit the config, or the model has fewer layers.
    """
    check_tensors(config, names.of, present)
    config = keep_layers(config, layers)
    check_layout(config, layout)

    def build(path: ParamPath, shape: Shape) -> jax.Array:
        read_part = functools.partial(read, path, names.of(path))
        together = config.head_dim if len(shape) < 3 else 1  # heads are turned whole; experts are read one by one
        return layout.build(shape, dtype, param_axes(path), read_part, together)

    return config, unflatten_dict({path: build(path, shape) for path, shape in param_shapes(config).items()})


def keep_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """Cuts a config to its first layers.

    Args:
      config: the whole config.
      layers: how many layers to keep; all where None.

    Returns:
      The config with that many layers.

    Raises:
      KvjaxError: `layers` is not between 1 and the number of layers.
    """
    if layers is None:
        return config
    return dataclasses.replace(config, layers=check_whole("layers", layers, 1, config.layers, ", the model's own"))
