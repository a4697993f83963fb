"""Where raw images come from: a folder of image files, Parquet files with a column of them, or WebDataset tars.

Each kind is read as a stream of entries in an order of its own, a few files in memory at once. What is wrong with one
image is said in its entry. A Parquet file or a tar that is broken ends with an entry that says so; what came before it
stays. What storage has to say is raised: it is not the images' fault.
"""

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import ConfigurationError, DataError
from pipelines.images import EMPTY, MAX_FILE_BYTES, SUFFIXES
from pipelines.shards import Ranges
from pipelines.storage import Folder
from pipelines.stored import Stored

Kind: TypeAlias = Literal["files", "parquet", "tar"]

KINDS: dict[Kind, tuple[str, ...]] = {"files": SUFFIXES, "parquet": (".parquet",), "tar": (".tar",)}
FETCH_FILES, FETCH_BYTES = 32, 16 << 20
"""What is fetched at once: files, and bytes of them."""
_READ_BYTES = 8 << 20
"""What is read at once of a tar."""


class Entry(NamedTuple):
    """An image file, wherever it lies, or what is wrong with it."""

    path: str
    """Relative to the source; in a Parquet file or a tar, its path, then the row or the member's name."""
    data: bytes
    label: str | None = None
    reason: str = ""
    """Why it cannot be used, if that is known already."""
    rest_lost: bool = False
    """Whether the reason holds for all that comes after it in the Parquet file or tar."""


def kind_of(found: list[Stored], said: Kind | Literal["auto"], url: str) -> Kind:
    """Return what a source holds, by the names of its files.

    Raises:
        DataError: if it holds nothing of what is known, or of what was said.
        ConfigurationError: if it holds several kinds, and none was said.
    """
    counts = {kind: sum(_has_suffix(file.name, kind) for file in found) for kind in KINDS}
    there = [kind for kind in KINDS if counts[kind] and said in ("auto", kind)]
    if not there:
        suffixes = [suffix for kind in KINDS if said in ("auto", kind) for suffix in KINDS[kind]]
        what = f"none of its {len(found)} files ends in {', '.join(suffixes)}" if found else "there is nothing there"
        raise DataError(f"{url} holds no images: {what}; check the URL, or its rights")
    if len(there) > 1:
        words = " and ".join(f"{counts[kind]} of kind {kind}" for kind in there)
        raise ConfigurationError(
            f"{url} holds files of several kinds, {words}: set ingest.source_kind to one, such as {there[0]}"
        )
    return there[0]


def of_kind(found: list[Stored], kind: Kind) -> list[Stored]:
    """Return the files of a kind, in their order."""
    return [file for file in found if _has_suffix(file.name, kind)]


def _has_suffix(name: str, kind: Kind) -> bool:
    return name.lower().endswith(KINDS[kind])


def portions(sizes: list[int]) -> Iterator[slice]:
    """Cut files of these sizes, in bytes, into runs that are fetched at once."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and (i - start == FETCH_FILES or total + size > FETCH_BYTES):
            yield slice(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


@dataclass(frozen=True, kw_only=True)
class Source:
    """How to read the files of a source."""

    folder: Folder
    kind: Kind
    labels: Literal["own", "none", "listed"]
    """Each entry's own (the folder it is in, its column, its .cls), none, or those of a list."""
    image_column: str
    label_column: str

    def entries(self, files: list[Stored], listed: dict[str, str], first: int = 0) -> Iterator[Entry]:
        """Yield the images of files, in order.

        Args:
            files: the files.
            listed: labels by path, if the labels are listed.
            first: the row to begin at, of one Parquet file. Its row group is read from its beginning.
        """
        if self.kind == "parquet":
            found = self._of_parquets(files, first)
        else:
            found = self._of_files(files) if self.kind == "files" else self._of_tars(files)
        for entry in found:
            yield self._judged(entry, listed)

    def listing(self, files: list[Stored], listed: dict[str, str]) -> Iterator[tuple[Stored, Entry]]:
        """Yield image files with what is known of them before they are fetched: an entry without data."""
        for file in files:
            entry = self._file(file, b"")
            if not file.size_bytes:
                entry = entry._replace(reason=EMPTY)
            yield file, self._judged(entry, listed)

    def _judged(self, entry: Entry, listed: dict[str, str]) -> Entry:
        """Give an entry its label; refuse a name that no Parquet file can hold."""
        if not _is_text(entry.path):
            path = entry.path.encode(errors="backslashreplace").decode()
            return entry._replace(path=path, data=b"", reason="its name is not UTF-8")
        if self.labels == "own" and not _is_text(entry.label or ""):
            return entry._replace(label=None, data=b"", reason="its label is not UTF-8")
        if entry.reason or self.labels == "own":
            return entry
        if self.labels == "none":
            return entry._replace(label=None)
        if entry.path in listed:
            return entry._replace(label=listed[entry.path])
        return entry._replace(data=b"", reason="the list of labels has no line for it")

    def _of_files(self, files: list[Stored]) -> Iterator[Entry]:
        for part in portions([file.size_bytes for file in files]):
            usable = [file.name for file in files[part] if 0 < file.size_bytes <= MAX_FILE_BYTES]
            # A fetch that fails raises: only what a file holds can make it a bad one.
            contents = dict(zip(usable, self.folder.get_many(usable), strict=True))
            for file in files[part]:
                yield self._file(file, contents.get(file.name, b""))

    def _file(self, file: Stored, data: bytes) -> Entry:
        reason = "" if file.size_bytes <= MAX_FILE_BYTES else _too_large(file.size_bytes)
        return Entry(file.name, data, PurePosixPath(file.name).parent.name or None, reason)

    def _of_parquets(self, files: list[Stored], first: int) -> Iterator[Entry]:
        assert not first or len(files) == 1, files
        for file in files:
            try:
                yield from self._of_parquet(file, first)
            except (OSError, ValueError, KeyError) as error:  # of Arrow: storage has errors of its own
                yield _broken(file, error)

    def columns(self, file: Stored) -> list[str]:
        """Return the names of the columns of a Parquet file, none of a broken one."""
        try:
            return list(self._opened(file).schema_arrow.names)
        except (OSError, ValueError, KeyError):
            return []

    def group_rows(self, file: Stored) -> list[int]:
        """Return the rows of each row group of a Parquet file; of a broken one there are none."""
        try:
            return _group_rows(self._opened(file))
        except (OSError, ValueError, KeyError):
            return []

    def _opened(self, file: Stored) -> Any:
        raw = Ranges(self.folder, file.name, file.size_bytes)
        return pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)

    def _of_parquet(self, file: Stored, first: int) -> Iterator[Entry]:
        parquet = self._opened(file)
        schema = parquet.schema_arrow
        if self.image_column not in schema.names:
            raise ValueError(
                f"it has no column {self.image_column!r} but {', '.join(schema.names)}; set "
                "ingest.image_column to one of them"
            )
        kind = schema.field(self.image_column).type
        inner = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not _is_bytes(kind.field("bytes").type if inner else kind):
            raise ValueError(f"its column {self.image_column!r} holds {kind}, not the bytes of images")
        columns = [f"{self.image_column}.bytes" if inner else self.image_column]
        if labelled := self.labels == "own" and self.label_column in schema.names:
            columns.append(self.label_column)
        names = _class_names(schema, self.label_column)
        ends = list(accumulate(_group_rows(parquet)))
        begin = bisect_right(ends, first)
        row = ends[begin - 1] if begin else 0
        for batch in chain.from_iterable(
            parquet.iter_batches(batch_size=16, row_groups=[group], columns=columns, use_threads=False)
            for group in range(begin, len(ends))
        ):
            if row + len(batch) <= first:
                row += len(batch)
                continue
            images = batch.column(self.image_column)
            images = images.field("bytes") if inner else images
            labels = batch.column(self.label_column).to_pylist() if labelled else [None] * len(batch)
            for data, label in zip(images, labels, strict=True):
                if row >= first:
                    content = data.as_py() or b""
                    reason = _too_large(len(content)) if len(content) > MAX_FILE_BYTES else ""
                    yield Entry(f"{file.name}/{row}", b"" if reason else content, _class_name(label, names), reason)
                row += 1

    def _of_tars(self, files: list[Stored]) -> Iterator[Entry]:
        for file in files:
            try:
                yield from self._of_tar(file)
            except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
                yield _broken(file, error)

    def _of_tar(self, file: Stored) -> Iterator[Entry]:
        """Yield the samples of a tar: members in a row with the same name up to the first dot are one."""
        raw = io.BufferedReader(Ranges(self.folder, file.name, file.size_bytes), _READ_BYTES)
        with tarfile.open(fileobj=raw, mode="r|", bufsize=1 << 20) as tar:
            key, sample = "", dict[str, Entry]()
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # it would keep all that it has seen
                if not member.isfile():
                    continue
                head, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if (this := f"{head}/{stem}") != key:
                    yield from _sample(file.name, key, sample)
                    key, sample = this, {}
                extension = extension.lower()
                if f".{extension}" in SUFFIXES or extension in ("cls", "txt", "json"):
                    content = tar.extractfile(member) if member.size <= MAX_FILE_BYTES else None
                    reason = "" if content else _too_large(member.size)
                    sample[extension] = Entry(
                        f"{file.name}/{member.name}", content.read() if content else b"", None, reason
                    )
            yield from _sample(file.name, key, sample)
        end = Ranges(self.folder, file.name, file.size_bytes)
        end.seek(tar.offset)
        if end.read(512) != bytes(512):  # tarfile takes anything that is no header for the end
            raise ValueError(f"it has no end, and is cut off or damaged at byte {tar.offset}")


def _sample(tar: str, key: str, members: dict[str, Entry]) -> Iterator[Entry]:
    """Yield the sample that members of a tar make, by their extensions, if there are any."""
    if not members:
        return
    image = next((entry for extension, entry in members.items() if f".{extension}" in SUFFIXES), None)
    if image is None:
        yield Entry(f"{tar}/{key.lstrip('/')}", b"", reason="the sample has no image")
        return
    try:
        yield image._replace(label=_label_of(members))
    except (ValueError, AttributeError, RecursionError) as error:
        yield image._replace(data=b"", reason=f"its label cannot be read: {error}")


def _label_of(members: dict[str, Entry]) -> str | None:
    """Return what .cls says, or else the "label" of .json, or else .txt."""
    if "cls" in members:
        return members["cls"].data.decode().strip() or None
    if "json" in members and (label := json.loads(members["json"].data).get("label")) is not None:
        return str(label)
    return members["txt"].data.decode().strip() or None if "txt" in members else None


def _broken(file: Stored, error: Exception) -> Entry:
    return Entry(file.name, b"", reason=f"{type(error).__name__}: {error}".replace("\n", " "), rest_lost=True)


def _too_large(size: int) -> str:
    return f"{size} bytes are more than {MAX_FILE_BYTES}"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _group_rows(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: Any, column: str) -> list[str]:
    """Return the names behind a column of class numbers, where Hugging Face's ``datasets`` has written them down."""
    try:
        about = json.loads(schema.metadata[b"huggingface"])
        return list(about["info"]["features"][column]["names"])
    except (TypeError, KeyError, ValueError):
        return []


def _class_name(label: Any, names: list[str]) -> str | None:
    if label is None or (names and label == -1):  # Hugging Face's sign for no label
        return None
    return names[label] if names and isinstance(label, int) and 0 <= label < len(names) else str(label)
