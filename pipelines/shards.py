"""One shard of a data set: a Parquet file whose row groups are read whole, each page with a checksum of its own."""

import hashlib
import io
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import DamagedError
from pipelines.storage import Folder

PICTURES = pa.schema([("image", pa.binary()), ("label", pa.string()), ("path", pa.string())])
"""The columns of pictures; a row without a label has null there."""
IN_PLACE = pa.schema(
    [("path", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string()), ("label", pa.string())]
)
"""The columns of pictures that stay where they are."""
READ_OF_PICTURES, READ_IN_PLACE = ("image", "label"), tuple(IN_PLACE.names)
"""What training reads of either, and what the checksums are of."""
MAX_SHARD_BYTES = 256 << 20
"""A shard that has grown to this is closed, whatever number of rows it was to have."""
_FOOTER_BYTES = 64 << 10
_AHEAD = 8
"""Pieces of a remote object that are on their way at once."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file, with the columns of :data:`PICTURES` or of :data:`IN_PLACE`."""

    name: str
    rows: int
    size_bytes: int
    sha256: str
    image_bytes: int
    """Bytes of the images, here or where they are."""
    crc32: tuple[int, ...]
    """Of what is read of each row group: neither a flipped bit nor another shard is taken for this one."""


class ShardWriter:
    """Packs rows into shards, ``<stem>-0000.parquet`` and on, each written by one put. Same rows, same bytes."""

    def __init__(
        self, out: Folder, stem: str, schema: Any, shard_rows: int, row_group_rows: int, compression: str
    ) -> None:
        self.shards: list[Shard] = []
        self._out, self._stem, self._schema, self._compression = out, stem, schema, compression
        self._shard_rows, self._row_group_rows = shard_rows, row_group_rows
        self._group: list[tuple[Any, ...]] = []
        self._begin()

    def _begin(self) -> None:
        self._buffer, self._rows, self._image_bytes = pa.BufferOutputStream(), 0, 0
        self._parquet = pq.ParquetWriter(
            self._buffer,
            self._schema,
            compression=self._compression,
            use_dictionary=["label"],
            write_statistics=False,
            write_page_checksum=True,
        )

    def add(self, *row: Any) -> None:
        """Take one row, its values in the order of the schema."""
        self._group.append(row)
        self._image_bytes += len(row[0]) if "image" in self._schema.names else row[1]
        if len(self._group) == self._row_group_rows or self._rows + len(self._group) == self._shard_rows:
            self._write_group()
            if self._rows == self._shard_rows or self._buffer.tell() >= MAX_SHARD_BYTES:
                self._put()

    def close(self) -> list[Shard]:
        """Write what is left; return all shards."""
        if self._group:
            self._write_group()
        if self._rows:
            self._put()
        return self.shards

    def _write_group(self) -> None:
        columns = zip(*self._group, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._parquet.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows += len(self._group)
        self._group = []

    def _put(self) -> None:
        self._parquet.close()
        data = self._buffer.getvalue().to_pybytes()
        name = f"{self._stem}-{len(self.shards):04d}.parquet"
        self._out.put(name, data)
        metadata = pq.read_metadata(pa.BufferReader(data))
        columns = READ_OF_PICTURES if "image" in self._schema.names else READ_IN_PLACE
        spans = (_span(metadata, group, columns) for group in range(metadata.num_row_groups))
        sums = tuple(zlib.crc32(data[start:stop]) for start, stop in spans)
        sha256 = hashlib.sha256(data).hexdigest()
        self.shards.append(
            Shard(
                name=name,
                rows=self._rows,
                size_bytes=len(data),
                sha256=sha256,
                image_bytes=self._image_bytes,
                crc32=sums,
            )
        )
        self._begin()


class Ranges(io.RawIOBase):
    """An object of known size, read by ranges: whatever storage has to say comes as its own error."""

    def __init__(self, folder: Folder, name: str, size_bytes: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._range(self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        return self._folder.get_range(self._name, start, stop) if start < stop else b""


class _Piece(Ranges):
    """An object of which one piece is in memory already."""

    def __init__(self, folder: Folder, shard: Shard, start: int, piece: bytes) -> None:
        super().__init__(folder, shard.name, shard.size_bytes)
        self._start, self._piece = start, piece

    def _range(self, start: int, stop: int) -> bytes:
        if self._start <= start and stop <= self._start + len(self._piece):
            return self._piece[start - self._start : stop - self._start]
        return super()._range(start, stop)


def read_group(folder: Folder, shard: Shard, group: int, columns: tuple[str, ...]) -> Any:
    """Fetch columns of a row group with one request and check them: a table, its labels as a dictionary.

    Raises:
        DamagedError: if the shard is not what the manifest says, or a bit of the row group has flipped.
    """
    try:
        metadata = _footer(folder, shard, columns)
        start, stop = _span(metadata, group, columns)
        data = folder.get_range(shard.name, start, stop)
        if columns in (READ_OF_PICTURES, READ_IN_PLACE) and zlib.crc32(data) != shard.crc32[group]:
            raise ValueError(f"row group {group} is not what was written, its checksum differs")
        piece = _Piece(folder, shard, start, data)
        parquet = pq.ParquetFile(piece, metadata=metadata, read_dictionary=["label"], pre_buffer=False)
        return parquet.read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DamagedError(
            f"{folder.url}/{shard.name} cannot be read: {error}; ingest the data again into another folder"
        ) from error


def _span(metadata: Any, group: int, columns: tuple[str, ...]) -> tuple[int, int]:
    """Return where the columns of a row group begin and end in their file."""
    about, spans = metadata.row_group(group), []
    for i in range(about.num_columns):
        column = about.column(i)
        if column.path_in_schema in columns:
            first = column.dictionary_page_offset or column.data_page_offset
            spans.append((first, first + column.total_compressed_size))
    return min(first for first, _ in spans), max(last for _, last in spans)


@lru_cache(maxsize=1024)
def _footer(folder: Folder, shard: Shard, columns: tuple[str, ...]) -> Any:
    """Return the Parquet metadata of a shard that is what the manifest says; a process asks for it once, mostly."""
    where = f"{folder.url}/{shard.name}"
    with folder.open(shard.name) as file:
        size = file.seek(0, io.SEEK_END)
    if size != shard.size_bytes:
        raise DamagedError(f"{where} has {size} bytes, the manifest says {shard.size_bytes}; ingest the data again")
    start = max(0, size - _FOOTER_BYTES)
    metadata = pq.read_metadata(_Piece(folder, shard, start, folder.get_range(shard.name, start, size)))
    if metadata.num_rows != shard.rows:
        raise DamagedError(
            f"{where} has {metadata.num_rows} rows, the manifest says {shard.rows}; ingest the data again"
        )
    there = metadata.schema.to_arrow_schema().names
    if missing := [name for name in columns if name not in there]:
        raise DamagedError(f"{where} has no column {missing[0]!r}, it has {', '.join(there)}; ingest the data again")
    return metadata


def ahead(folder: Folder, work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Yield work(item) for each item, in their order; of a remote folder with several requests under way."""
    if folder.is_local:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
