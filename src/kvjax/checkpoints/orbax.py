"""Models on disk in Orbax's format: params/ with the arrays, kvjax.json with the config, tokenizer.json."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from kvjax import hosts
from kvjax.errors import KvjaxError
from kvjax.files import brief, check_digests, digests, read_json, write_json
from kvjax.mesh import ONE_DEVICE, Layout
from kvjax.models.config import MOST_LAYERS, ModelConfig, RopeConfig
from kvjax.models.model import Model
from kvjax.models.params import (
    Params,
    check_layout,
    check_tensors,
    keep_layers,
    param_axes,
    param_shapes,
)
from kvjax.models.tokenizer import AnyTokenizer, ByteTokenizer, Tokenizer
from kvjax.models.tokenizer_files import read_tokenizer

METADATA = "kvjax.json"


def save(folder: Path, model: Model) -> None:
    """Writes a model to a new folder, which appears complete or not at all.

    Several processes that share the model must all call it, with a folder that all see; each writes its part.

    Args:
      folder: the folder; it must not exist.
      model: the model.

    Raises:
      KvjaxError: the folder exists, or it cannot be written.
    """
    metadata = {
        "name": model.name,
        "checksum": model.checksum,
        "dtype": str(model.dtype),
        "tokenizer": "bytes" if isinstance(model.tokenizer, ByteTokenizer) else "tokenizer.json",
        "config": dataclasses.asdict(model.config),
    }
    with new_folder(folder) as part:
        write_arrays(part / "params", model.params)
        hosts.on_first(lambda: write_json(part / METADATA, metadata | {"params": digests(part / "params")}))
        if isinstance(model.tokenizer, Tokenizer):
            hosts.on_first(functools.partial(model.tokenizer.save, part))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, and renames it when the `with` block ends.

    So `folder` appears complete or not at all. Several processes fill the same one.

    Args:
      folder: the final name; it must not exist.

    Yields:
      The temporary folder.

    Raises:
      KvjaxError: the folder exists, or it cannot be written.
    """
    folder = folder.absolute()
    try:
        part = Path(hosts.on_first(lambda: _new_part(folder)))
        try:
            yield part
            hosts.on_first(lambda: _finish(part, folder))
        except BaseException:
            if hosts.index() == 0:
                _remove(part.parent)
            raise
    except OSError as error:
        raise KvjaxError(f"{folder} cannot be written: {error.strerror or error}") from None


def _new_part(folder: Path) -> str:
    """A temporary folder beside one that is to be; it has the user's permissions, which mkdtemp restricts."""
    if folder.exists():
        raise KvjaxError(f"{folder} exists already; expected a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent)) / "part"
    part.mkdir()
    return str(part)


def _finish(part: Path, folder: Path) -> None:
    part.rename(folder)
    part.parent.rmdir()


def _remove(folder: Path) -> None:
    """Removes a folder, trying again while threads of Orbax's storage go on writing into it after a failure."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.25)
        if not folder.exists():
            return


def write_arrays(folder: Path, tree: Any) -> None:
    """Writes a tree of arrays.

    Args:
      folder: a new folder.
      tree: the arrays.

    Raises:
      OSError: the arrays cannot be written.
    """
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=together()) as checkpointer:
            checkpointer.save(folder, tree)
    except Exception as error:  # Orbax and its storage raise many kinds
        code = re.search(r"os_error_code='(\d+)'", str(error))  # how the storage reports an error of the system
        raise OSError(os.strerror(int(code[1])) if code else brief(error)) from None


def together() -> ocp.options.MultiprocessingOptions:
    """Which processes read or write an Orbax checkpoint together: all, or one that works alone."""
    if hosts.several() or not jax.distributed.is_initialized():
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}")


def read_config(folder: Path) -> ModelConfig:
    """Reads the config that `save` wrote. Older files say from which layer on there is a window.

    Args:
      folder: the folder.

    Returns:
      The config.

    Raises:
      KvjaxError: the folder is not one that `save` wrote.
    """
    metadata = read_json(folder / METADATA)
    try:
        fields = metadata["config"]
        kept = {name: value for name, value in fields.items() if name != "first_window_layer"}
        full_layers = kept.get("full_layers") or range(min(fields.get("first_window_layer", 0), MOST_LAYERS))
        ropes = {name: _rope(kept.get(name)) for name in ("rope", "window_rope")}
        layers = {"full_layers": tuple(full_layers), "nope_layers": tuple(kept.get("nope_layers", ()))}
        return ModelConfig(**kept | ropes | layers)
    except (KeyError, TypeError, AttributeError) as error:
        raise KvjaxError(f"{folder / METADATA} is not one that kvjax wrote: {brief(error)}") from None


def _rope(fields: dict[str, Any] | None) -> Any:
    """A RopeConfig as JSON has it; None stays None."""
    lists = {name: tuple(value) for name, value in (fields or {}).items() if isinstance(value, list)}
    return None if fields is None else RopeConfig(**fields | lists)


def load(
    folder: Path,
    dtype: DTypeLike,
    layers: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[ModelConfig, Params, AnyTokenizer]:
    """Reads what `save` wrote.

    Args:
      folder: the folder.
      dtype: dtype of the parameters.
      layers: how many layers to keep, from the first; all where None.
      layout: where the parameters live. Each device's part is read alone.

    Returns:
      The config, the parameters and the tokenizer.

    Raises:
      KvjaxError: the folder is not one that `save` wrote, it is damaged, or the model has fewer layers.
    """
    folder = folder.absolute()
    saved = read_config(folder)
    metadata = read_json(folder / METADATA)
    try:
        sums = metadata["params"]
        tokenizer = ByteTokenizer() if metadata["tokenizer"] == "bytes" else read_tokenizer(folder)
    except (KeyError, TypeError) as error:
        raise KvjaxError(f"{folder / METADATA} is not one that kvjax wrote: {brief(error)}") from None
    config = keep_layers(saved, layers)
    check_layout(config, layout)
    check_digests(folder / "params", sums)  # Orbax answers some damage with pages of output on stderr
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=together())
        with ocp.Checkpointer(handler, multiprocessing_options=together()) as checkpointer:
            return config, _restore(checkpointer, folder / "params", saved, config, dtype, layout), tokenizer
    except KvjaxError:
        raise
    except Exception as error:  # Orbax and its storage raise many kinds
        raise KvjaxError(f"{folder / 'params'} cannot be restored: {brief(error)}") from None


def _restore(
    checkpointer: ocp.Checkpointer,
    folder: Path,
    saved: ModelConfig,
    config: ModelConfig,
    dtype: DTypeLike,
    layout: Layout,
) -> Params:
    metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise KvjaxError(f"{folder} is not a whole Orbax checkpoint")
    stored = flatten_dict(metadata.tree)
    # A partial restore would leave out missing arrays silently.
    check_tensors(saved, "/".join, {"/".join(path): leaf.shape for path, leaf in stored.items()})
    shapes = param_shapes(config).items()
    wanted = unflatten_dict({path: layout.struct(param_axes(path), shape, dtype) for path, shape in shapes})
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    return checkpointer.restore(
        folder, args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
    )
