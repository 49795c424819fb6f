"""Loading of any model by name or path: `load(name)`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256 as sha256_of
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax.checkpoints import orbax
from kvjax.checkpoints.gguf import GGUFFile
from kvjax.checkpoints.safetensors import load_hf, read_hf_config, weight_files
from kvjax.checks import check_path, show
from kvjax.downloads import fetch
from kvjax.errors import KvjaxError
from kvjax.files import brief, hashing, sha256
from kvjax.mesh import Layout
from kvjax.models import zoo
from kvjax.models.config import ModelConfig
from kvjax.models.model import Model
from kvjax.models.params import Params, keep_layers
from kvjax.models.tokenizer import AnyTokenizer, ByteTokenizer
from kvjax.models.tokenizer_files import read_tokenizer

DTYPES = ("float32", "bfloat16", "float64")


def load(
    name: str | Path,
    dtype: str | None = None,
    layers: int | None = None,
    *,
    mesh: str | Mesh | None = None,
    replicate: str | Sequence[str] = (),
) -> Model:
    """Loads a model, onto one device or straight to the parts of a mesh.

    Args:
      name: a name of `kvjax.models.zoo` (smollm2-135m, smollm2-135m-mha, gemma3-270m or random:...); the path of a HF
        folder, of a .gguf file or of a folder that `kvjax.checkpoints.orbax.save` wrote; or org/name on the hub. May
        end in (layers=N), which sets `layers`.
      dtype: float32, bfloat16 or float64; where None, float32 on CPU and bfloat16 elsewhere.
      layers: how many layers to keep, from the first; all where None.
      mesh: devices that share the model and all that is computed with it: a text such as data=2,tensor=4, see
        `kvjax.mesh.parse`, or a mesh with these axes; one device where None. Its axis `seq` is not used yet.
      replicate: logical axes that are kept whole on every device, see `kvjax.mesh.RULES`.

    Returns:
      The model.

    Raises:
      KvjaxError: one line that says what was expected.
    """
    name, layers = _split_layers(str(check_path("the model's name", name)), layers)
    resolved, layout = _resolve_dtype(dtype), Layout.of(mesh, replicate)
    suffix = "" if layers is None else f"(layers={layers})"
    with _naming(name):
        return Model(name + suffix, *_load(name, resolved, layers, layout), layout)


def read_config(name: str | Path) -> ModelConfig:
    """Reads the config of a model and none of its weights, so that what does not fit it is refused early.

    Args:
      name: as for `load`.

    Returns:
      The config.

    Raises:
      KvjaxError: one line that says what was expected.
    """
    name, layers = _split_layers(str(check_path("the model's name", name)), None)
    with _naming(name):
        return keep_layers(_read_config(name), layers)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the model's name into errors that lack it."""
    try:
        yield
    except KvjaxError as error:
        if name in str(error):
            raise
        raise KvjaxError(f"{name}: {error}") from None  # checks of shapes do not know the file
    except OSError as error:
        raise KvjaxError(f"{error.filename or name} cannot be read: {error.strerror}") from None


def _read_config(name: str) -> ModelConfig:
    path = Path(name)
    if name in zoo.RANDOM:
        return zoo.RANDOM[name]
    if name in zoo.FILES:
        config = GGUFFile(fetch(zoo.FILES[name])).config()
        return dataclasses.replace(config, kv_heads=config.heads) if name.endswith("-mha") else config
    if path.is_file() and path.suffix == ".gguf":
        return GGUFFile(path).config()
    if (path / orbax.METADATA).is_file():
        return orbax.read_config(path)
    return read_hf_config(path if path.is_dir() else _snapshot(name))


def _load(
    name: str, dtype: jnp.dtype, layers: int | None, layout: Layout
) -> tuple[ModelConfig, Params, AnyTokenizer, jnp.dtype, str]:
    path = Path(name)
    if name in zoo.RANDOM:
        config = keep_layers(zoo.RANDOM[name], layers)
        checksum = sha256_of(f"{name}(layers={config.layers})".encode()).hexdigest()
        return config, zoo.random_params(config, dtype, layout), ByteTokenizer(), dtype, checksum
    if name in zoo.FILES:
        pinned = zoo.FILES[name]
        file = GGUFFile(fetch(pinned))
        config, params = file.load(dtype, layers, layout)
        checksum = pinned.sha256
        if name.endswith("-mha"):
            config, params = zoo.expand_kv_heads(config, params, layout)
            checksum = sha256_of(f"{checksum}, kv heads repeated".encode()).hexdigest()
        return config, params, file.tokenizer(), dtype, checksum
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile(path)
        with hashing([path]) as checksum_of_file:
            return *file.load(dtype, layers, layout), file.tokenizer(), dtype, checksum_of_file()
    if (path / orbax.METADATA).is_file():
        files = sorted(file for file in path.iterdir() if file.is_file())  # METADATA has the arrays' checksums
        return *orbax.load(path, dtype, layers, layout), dtype, sha256(files)
    if not path.is_dir():
        path = _snapshot(name)
    files, tokenizer = [path / "config.json", *weight_files(path)], read_tokenizer(path)
    with hashing(files) as checksum_of_files:
        return *load_hf(path, dtype, layers, layout), tokenizer, dtype, checksum_of_files()


def _split_layers(name: str, layers: int | None) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)\(layers=(\d+)\)", name)
    if match is None:
        return name, layers
    if layers is not None:
        raise KvjaxError(f"{name} names its layers already; expected no layers={layers} beside it")
    return match[1], int(match[2])


def _resolve_dtype(dtype: str | None) -> jnp.dtype:
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise KvjaxError(f"dtype {show(dtype)} is not supported; expected one of {', '.join(DTYPES)}")
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise KvjaxError("dtype float64 needs jax_enable_x64; turn it on before jax computes anything")
    return jnp.dtype(dtype)


def _snapshot(name: str) -> Path:
    """Downloads a hub model: only safetensors, JSON and chat template, nothing that could run code."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = ", ".join(zoo.NAMES)
        raise KvjaxError(f"no model {name!r}; expected {known}, a HF folder, a .gguf file or a hub's org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.safetensors", "*.json", "*.jinja"],
                ignore_patterns=[
                    "*/*.safetensors",
                    "*/*.json",
                    "consolidated*",
                ],  # copies of the same weights in other formats
            )
        )
    except Exception as error:  # from the hub, the network or the file system
        raise KvjaxError(
            f"{name} is no local path and the hub cannot bring it ({brief(error)}); fetch config.json,"
            " tokenizer.json and *.safetensors of that model by other means and give their folder's path"
        ) from None
