"""A folder whose ranges are kept on the disk of whoever reads them: later epochs need not fetch them again."""

import contextlib
import os
import shutil
import stat
import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.storage import Folder

LOOK_EVERY = 64
"""Ranges that a process keeps between two looks at how much there is."""
_CRC_BYTES = 4


@dataclass(frozen=True)
class KeptFolder(Folder):
    """A folder of objects that do not change, below one digest.

    What was fetched is a file each, with a checksum at its end: one that is damaged, cut off or gone is fetched again.
    When there is no room nothing more is kept, and what is there stays: of a data set that is larger than the room each
    epoch then finds the same share, where the least recently used would find nothing.
    """

    digest: str
    """Names what the objects hold; what was kept of others makes room."""
    max_bytes: int
    """Room for all that is kept on this machine."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"digest": self.digest, "max_bytes": self.max_bytes}

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        file = self._home / f"{name.replace('/', '_')}-{start}-{stop}"
        with contextlib.suppress(OSError):
            kept = file.read_bytes() if self._is_ours else b""
            data = kept[:-_CRC_BYTES]
            if zlib.crc32(data).to_bytes(_CRC_BYTES) == kept[-_CRC_BYTES:] and len(data) == stop - start:
                return data
        data = super().get_range(name, start, stop)
        with contextlib.suppress(OSError):  # a full disk costs nothing but the fetching
            self._keep(file, data)
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        count = self._count
        if count["files"] % LOOK_EVERY == 0:
            count["bytes"] = self._make_room(len(data))
        count["files"] += 1
        if count["bytes"] + len(data) > self.max_bytes:
            return
        count["bytes"] += len(data)
        # Beside its place and then into it: a reader meets no half of a file.
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(data)
                out.write(zlib.crc32(data).to_bytes(_CRC_BYTES))
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> int:
        """Return how many bytes are kept here; what is kept of other data goes if they leave no room."""
        self._home.parent.mkdir(exist_ok=True, mode=0o700)
        if not self._is_ours:
            raise PermissionError(f"{self._home.parent} is not this user's alone")
        self._home.mkdir(exist_ok=True)
        sizes = {home: _size(home) for home in self._home.parent.iterdir()}
        for home in sizes.keys() - {self._home}:
            if sum(sizes.values()) + size > self.max_bytes:
                shutil.rmtree(home, ignore_errors=True)
                sizes[home] = 0
        return sum(sizes.values())

    @property
    def _is_ours(self) -> bool:
        """Whether nobody else can have put there what is read: the name can be guessed."""
        about = self._home.parent.lstat()
        return about.st_uid == os.getuid() and stat.S_IMODE(about.st_mode) == 0o700

    @cached_property
    def _home(self) -> Path:
        return Path(tempfile.gettempdir()) / f"brickyard-kept-{os.getuid()}" / self.digest

    @cached_property
    def _count(self) -> dict[str, int]:
        return {"files": 0, "bytes": 0}


def kept(folder: Folder, digest: str, gigabytes: float) -> Folder:
    """Return a folder that keeps what is read of it, if it is remote and there is room to be used."""
    return folder if folder.is_local or not gigabytes else KeptFolder(folder.url, digest, int(gigabytes * 10**9))


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                total += entry.stat().st_size
    return total
