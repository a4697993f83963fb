"""Folders of objects at any URL that fsspec knows: the one place that touches storage.

Two promises are built on here. A :meth:`Folder.put` is seen whole or not at all, so a reader never meets half a file;
and of several writers that :meth:`Folder.create` the same name one wins and the others learn it.
"""

import contextlib
import difflib
import errno
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import ConfigurationError, DamagedError, DataError, TryAgainError

FETCHERS = 16
"""Objects that are fetched at once."""
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # reading it is setting it


class Stored(NamedTuple):
    """An object that was found."""

    name: str
    """Relative to the folder."""
    size_bytes: int
    version: str
    """Changes when the content does: the ETag of an object store, the time of the last change of a file."""


def absolute(url: str) -> str:
    """Return the URL with a local path made absolute: jobs and their workers may stand in different folders.

    Raises:
        ConfigurationError: if the URL is empty.
    """
    if not url:
        raise ConfigurationError("a storage URL is empty; give one like s3://bucket/folder or file:/data/folder")
    scheme = urlsplit(url).scheme
    if scheme not in ("", "file", "local"):
        return url.rstrip("/")
    path = url.removeprefix(f"{scheme}:").removeprefix("//") if scheme else url
    return "file://" + os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111  (resolve() follows links)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn what a storage client raises into a DataError that names the URL."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{url} does not exist") from error
    except (ConfigurationError, DataError):
        raise
    except (TimeoutError, ConnectionError) as error:
        raise TryAgainError(f"{url} does not answer: {type(error).__name__}: {error}; try again later") from error
    except Exception as error:  # every storage client has exceptions of its own
        raise DataError(
            f"{url} cannot be read or written: {type(error).__name__}: {error}; check the address, the credentials and "
            "their rights"
        ) from error


@dataclass(frozen=True)
class Folder:
    """A folder at a URL. Names are relative to it, with ``/`` between parts; a missing folder is an empty one.

    Raises:
        ConfigurationError: at first use, if there is no driver for the URL's scheme.
        DataError: from any method, if storage refuses or the object is missing.
    """

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", absolute(self.url))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @cached_property
    def filesystem(self) -> Any:
        """The fsspec file system of the URL."""
        scheme = urlsplit(self.url).scheme
        try:
            # Other processes write here too: what was listed a moment ago is not what is there.
            return fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            raise ConfigurationError(f"{self.url} needs a driver that is not installed: {error}") from error
        except ValueError as error:
            near = difflib.get_close_matches(scheme, ["s3", "gs", "file", "memory", "abfs", "https"], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}://?" if near else ""
            raise ConfigurationError(f"{self.url}: no storage driver knows the scheme {scheme!r}{hint}") from error

    @cached_property
    def _root(self) -> str:
        return str(self.filesystem._strip_protocol(self.url))

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # the client itself stays where it was made

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def path(self, name: str = "") -> str:
        """Return the path of an object as its file system knows it."""
        return f"{self._root}/{name}" if name else self._root

    def exists(self, name: str) -> bool:
        with _told(f"{self.url}/{name}"):
            return bool(self.filesystem.exists(self.path(name)))

    def get(self, name: str) -> bytes:
        """Return the bytes of an object."""
        with _told(f"{self.url}/{name}"):
            return bytes(self.filesystem.cat_file(self.path(name)))

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of an object."""
        with _told(f"{self.url}/{name}"):
            return bytes(self.filesystem.cat_file(self.path(name), start=start, end=stop))

    def get_many(self, names: list[str]) -> list[bytes]:
        """Return the bytes of several objects, fetched side by side."""
        with ThreadPoolExecutor(FETCHERS) as pool:
            return list(pool.map(self.get, names))

    def open(self, name: str) -> IO[bytes]:
        """Open an object for random reads."""
        with _told(f"{self.url}/{name}"):
            return self.filesystem.open(self.path(name), "rb")  # type: ignore[no-any-return]

    def download(self, name: str, to: Path) -> None:
        with _told(f"{self.url}/{name}"):
            self.filesystem.get_file(self.path(name), str(to))

    def put(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all, over whatever had its name."""
        with _told(f"{self.url}/{name}"):
            if self.is_local:
                with _complete_file(self.path(name), data) as written:
                    os.replace(written, self.path(name))  # noqa: PTH105
            else:
                self.filesystem.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of its name. Return whether this call made it."""
        if not self.is_local and self.exists(name):  # a server that knows no conditional write would overwrite it
            return False
        with _told(f"{self.url}/{name}"):
            try:
                if self.is_local:
                    with _complete_file(self.path(name), data) as written:
                        os.link(written, self.path(name))
                else:
                    self.filesystem.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # What s3fs makes of the server's "412 Precondition Failed".
                if error.errno == errno.EINVAL and self.exists(name):
                    return False
                raise
            return True

    def names(self) -> list[str]:
        """Return the names directly in this folder, sorted; sub-folders among them."""
        with _told(self.url):
            try:
                found = self.filesystem.ls(self._root, detail=False, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found if path.rstrip("/") != self._root)

    def find(self) -> list[Stored]:
        """Return every object below this folder, sorted by name."""
        with _told(self.url):
            found = self.filesystem.find(self._root, detail=True)
        return sorted(
            Stored(path.removeprefix(self._root).lstrip("/"), int(info["size"]), _version(info))
            for path, info in found.items()
        )

    def delete(self) -> None:
        """Remove the folder and all that is in it."""
        with _told(self.url):
            if self.filesystem.exists(self._root):
                self.filesystem.rm(self._root, recursive=True)


def _version(info: dict[str, Any]) -> str:
    """Return what tells two contents of one name apart, in the words of the storage client."""
    for word in ("ETag", "etag", "mtime", "md5Hash", "generation", "LastModified"):
        if word in info:
            return str(info[word]).strip('"')
    return ""


@contextlib.contextmanager
def _complete_file(path: str, data: bytes) -> Iterator[str]:
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
