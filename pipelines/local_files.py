"""What only the files of a local folder need: a listing that follows links, and a write that is seen whole."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from pipelines.stored import Stored

_UMASK = os.umask(0o022)
os.umask(_UMASK)  # reading it is setting it


def walk(root: str) -> Iterator[Stored]:
    """Yield the files below a local folder. Links are followed; those that lead nowhere, or in a circle, hold nothing.

    Raises:
        OSError: if a folder cannot be read: its files would be missing without a word.
    """

    def fail(error: OSError) -> None:
        if not (isinstance(error, FileNotFoundError) and error.filename == root):  # a missing folder is an empty one
            raise error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        within = os.path.realpath(folder) + "/"
        folders[:] = [each for each in folders if not within.startswith(os.path.realpath(f"{folder}/{each}") + "/")]
        for path in (f"{folder}/{name}" for name in names):
            name = path.removeprefix(root).lstrip("/")
            try:
                yield stored(name, path)
            except FileNotFoundError:  # a link that leads nowhere
                yield Stored(name, 0, "")


def stored(name: str, path: str) -> Stored:
    """Return what there is at a path, under a name.

    Raises:
        OSError: if there is nothing.
    """
    about = os.stat(path)  # noqa: PTH116
    return Stored(name, about.st_size, str(about.st_mtime))


@contextlib.contextmanager
def complete_file(path: str, data: bytes) -> Iterator[str]:
    """Write a file beside the one that is meant and flush it to the disk; what is left of it at the end goes."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # noqa: PTH101
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108
