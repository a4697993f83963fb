"""Folders of objects at any URL that fsspec knows: the one place that touches storage.

Three promises are built on here. A :meth:`Folder.put` is seen whole or not at all, so a reader never meets half a file;
of several writers that :meth:`Folder.create` the same name one wins and the others learn it; and what storage may do
better a little later is asked for again (:mod:`pipelines.retries`), so that an error is one that stays.
"""

import asyncio
import contextlib
import difflib
import errno
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import CHANGED, ConfigurationError, DamagedError
from pipelines.local_files import complete_file, stored, walk
from pipelines.retries import answers_head, error_code, explained
from pipelines.stored import Stored, version_of

FETCHERS = 16
"""Objects, or ranges of one, that are fetched at once."""
PIECE_BYTES = 16 << 20
"""What a download asks for at a time, and a half of what an upload sends in one request."""
Part = tuple[str, int | None, int | None, str]
"""The name of an object, the range of it that is meant, start and stop or None and None, and the version or nothing."""


def settled(url: str) -> str:
    """Return a setting that means the same wherever it is read: workers have working directories of their own."""
    return absolute(url) if url and not urlsplit(url).scheme and not url.startswith(("~", "/")) else url


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


@dataclass(frozen=True)
class Folder:
    """A folder at a URL. Names are relative to it, with ``/`` between parts; a missing folder is an empty one.

    Raises:
        ConfigurationError: at first use, if there is no driver for the URL's scheme.
        DataError: from any method, if storage refuses or the object is missing.
        TryAgainError: from any method, if storage does not answer for long, or the credentials have expired.
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
            if scheme in ("s3", "s3a"):
                from pipelines.s3 import filesystem  # half a second of imports that a local folder does not need

                return filesystem()
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

    @property
    def _is_s3(self) -> bool:
        return "s3" in self.filesystem.protocol

    def exists(self, name: str) -> bool:
        with self._told(name):
            return bool(self.filesystem.exists(self.path(name)))

    def written_at(self, name: str) -> float | None:
        """Return when an object was written, unix time by the clock of storage; None, if its client does not tell."""
        with self._told(name):
            try:
                return float(self.filesystem.modified(self.path(name)).timestamp())
            except NotImplementedError:
                return None

    def get(self, name: str) -> bytes:
        """Return the bytes of an object."""
        return self._fetch([(name, None, None, "")])[0]

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of an object, fewer where it ends before."""
        return self.get_ranges(name, [(start, stop)])[0]

    def get_many(self, names: list[str]) -> list[bytes]:
        """Return the bytes of several objects in the order asked for, fetched side by side."""
        return self._fetch([(name, None, None, "") for name in names])

    def get_unchanged(self, names: list[str], versions: list[str]) -> list[bytes]:
        """Return the bytes of several objects that are still what they were when :meth:`find` saw these versions.

        Raises:
            DamagedError: if one has changed since.
        """
        return self._fetch([(name, None, None, version) for name, version in zip(names, versions, strict=True)])

    def get_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Return several ranges of an object, each [start, stop), in the order asked for, fetched side by side."""
        return self._fetch([(name, start, stop, "") for start, stop in ranges])

    def open(self, name: str) -> IO[bytes]:
        """Open an object for random reads, each of which is a request of its own: ask for much at once."""
        with self._told(name):
            # By default s3fs reads 50 MB ahead, at every jump.
            return self.filesystem.open(self.path(name), "rb", cache_type="none")  # type: ignore[no-any-return]

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the bytes [0, size) of an object in order, fewer where it ends before: it may be larger than memory."""
        starts = range(0, size, PIECE_BYTES)
        for first in range(0, len(starts), FETCHERS // 2):
            several = starts[first : first + FETCHERS // 2]
            yield from self.get_ranges(name, [(start, min(start + PIECE_BYTES, size)) for start in several])

    def _fetch(self, parts: list[Part]) -> list[bytes]:
        client = self.filesystem
        if not client.async_impl:  # a file: threads would cost three times the CPU and gain nothing

            def read(name: str, start: int | None, stop: int | None, version: str) -> bytes:
                with self._told(name):
                    if version and stored(name, self.path(name)).version != version:
                        raise DamagedError(f"{self.url}/{name} {CHANGED}")
                    return b"" if _is_nothing(start, stop) else bytes(client.cat_file(self.path(name), start, stop))

            return [read(*part) for part in parts]

        gate = asyncio.Semaphore(FETCHERS)

        async def fetch(name: str, start: int | None, stop: int | None, version: str) -> bytes:
            same = {"version": version} if version and getattr(client, "compares_versions", False) else {}
            async with gate:
                with self._told(name):
                    if _is_nothing(start, stop):
                        return b""
                    if version and not same and version_of(await client._info(self.path(name))) != version:
                        raise DamagedError(f"{self.url}/{name} {CHANGED}")
                    return bytes(await client._cat_file(self.path(name), start=start, end=stop, **same))

        async def together() -> list[bytes]:
            tasks = [asyncio.ensure_future(fetch(*part)) for part in parts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # after an error nobody waits for the others
                    task.cancel()

        return sync(client.loop, together)  # type: ignore[no-any-return]

    def put(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all, over whatever had its name."""
        with self._told(name):
            if self.is_local:
                with complete_file(self.path(name), data) as written:
                    os.replace(written, self.path(name))  # noqa: PTH105
            else:
                self.filesystem.pipe_file(self.path(name), data, **self._upload())

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of its name. Return whether this call made it."""
        if not self.is_local and self.exists(name):  # a server that knows no conditional write would overwrite it
            return False
        mark = uuid.uuid4().hex
        with self._told(name):
            try:
                if self.is_local:
                    with complete_file(self.path(name), data) as written:
                        os.link(written, self.path(name))
                else:
                    self.filesystem.pipe_file(self.path(name), data, mode="create", **self._upload(mark))
            except OSError as error:
                # EINVAL is what s3fs makes of the server's "412 Precondition Failed".
                if not isinstance(error, FileExistsError) and not (error.errno == errno.EINVAL and self.exists(name)):
                    raise
                # What is there may be ours: written by an attempt whose answer was lost.
                return self._is_s3 and self.filesystem.metadata(self.path(name)).get("writer") == mark
            return True

    def _upload(self, mark: str = "") -> dict[str, Any]:
        """Return what the client is told of an upload: how many parts at once, and who writes."""
        if not self._is_s3:
            return {}
        return {"max_concurrency": FETCHERS // 2} | ({"Metadata": {"writer": mark}} if mark else {})

    def names(self) -> list[str]:
        """Return the names directly in this folder, sorted; sub-folders among them."""
        found: list[str] = []
        with self._told(), _missing_is_empty():
            found = self.filesystem.ls(self._root, detail=False, refresh=True)
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found if path.rstrip("/") != self._root)

    def find(self) -> list[Stored]:
        """Return every object below this folder, sorted by name."""
        with self._told():
            if self.is_local:
                return sorted(walk(self._root))
            found = self.filesystem.find(self._root, detail=True)
        prefix = f"{self._root}/"  # once: an object store's names may begin with, and hold, several
        return sorted(
            Stored(path.removeprefix(prefix), int(info["size"]), version_of(info)) for path, info in found.items()
        )

    def delete(self) -> None:
        """Remove the folder and all that is in it."""
        with self._told(), _missing_is_empty():
            self.filesystem.rm(self._root, recursive=True)

    @contextlib.contextmanager
    def _told(self, name: str = "") -> Iterator[None]:
        """Turn what a storage client raises into an error of ours that names the URL."""
        url = f"{self.url}/{name}" if name else self.url
        try:
            try:
                yield
            except OSError as error:
                if answers_head(error):  # which has no body to say why; a listing has
                    with contextlib.suppress(FileNotFoundError):
                        self.filesystem.ls(self._root, refresh=True)
                raise
        except Exception as error:  # every storage client has exceptions of its own
            raise explained(url, error) from error


def _is_nothing(start: int | None, stop: int | None) -> bool:
    """Whether a range is empty: asked for one, some servers answer with the whole object."""
    return start is not None and stop is not None and start >= stop


@contextlib.contextmanager
def _missing_is_empty() -> Iterator[None]:
    """Let a folder that does not exist pass, but not a bucket that does not."""
    try:
        yield
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
