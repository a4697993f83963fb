"""Lineage inside a PNG: a text chunk beside the pixels, which are not encoded anew.

A PNG is eight bytes and then chunks: length, type, content, CRC (ISO/IEC 15948, 5.3). A ``tEXt`` chunk, a keyword and
Latin-1 text, may stand anywhere between the first, ``IHDR``, and the last, ``IEND``. Ours follows ``IHDR``: readers
that stop at the pixels, such as Pillow before it decodes, see it too. It holds JSON in ASCII.

What a stamp says is what somebody has written there. It names things to look at; it proves nothing.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipelines.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"brickyard"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
"""The chunks that hold text. A program that writes the file anew may make another of them out of ours."""
MAX_BYTES = 64 << 10
"""Of a stamp."""


class Chunk(NamedTuple):
    """A part of a PNG."""

    kind: bytes
    start: int
    """Where its length stands in the file."""
    data: memoryview
    crc: int

    @property
    def stop(self) -> int:
        return self.start + 12 + len(self.data)

    @property
    def is_stamp(self) -> bool:
        return self.kind in TEXTS and self.data[: len(KEYWORD) + 1] == KEYWORD + b"\0"


def is_png(data: bytes) -> bool:
    """Whether something claims to be a PNG."""
    return data.startswith(SIGNATURE)


def stamped(png: bytes, lineage: dict[str, Any]) -> bytes:
    """Return a PNG that carries its lineage, in place of any that it carried; all other bytes are as they were.

    Args:
        png: the file.
        lineage: JSON as it is. What :mod:`pipelines.trace` looks for: all of a sample set's ``lineage``, and ``seed``,
            and ``label``.

    Raises:
        DataError: if it is no PNG, or the lineage is too long.
    """
    text = json.dumps(lineage, separators=(",", ":"), sort_keys=True).encode("ascii")
    if len(text) > MAX_BYTES:
        raise DataError(f"a lineage of {len(text)} bytes is too long for a stamp; at most {MAX_BYTES} fit")
    plain = bare(png)
    header = next(_chunks(plain)).stop
    return plain[:header] + _text_chunk(text) + plain[header:]


def bare(png: bytes) -> bytes:
    """Return a PNG without the lineage that it carries, damaged or not; all other bytes are as they were.

    Raises:
        DataError: if it is no PNG, or is cut off.
    """
    kept, at = bytearray(SIGNATURE), len(SIGNATURE)
    for chunk in _chunks(png):
        if not chunk.is_stamp:
            kept += png[chunk.start : chunk.stop]
        at = chunk.stop
    return bytes(kept + png[at:])


def stamp_of(png: bytes) -> dict[str, Any] | None:
    """Return the lineage that a PNG carries, or None.

    Raises:
        DataError: if it is no PNG, is cut off, or carries something else under our name.
    """
    chunk: Chunk | None = None
    for other in _chunks(png):
        if other.is_stamp and chunk:  # at once: there may be millions
            raise DataError("the PNG carries more than one lineage, of which one at most is its own")
        chunk = other if other.is_stamp else chunk
    if chunk is None:
        return None
    if zlib.crc32(chunk.data, zlib.crc32(chunk.kind)) != chunk.crc:
        raise DataError("the lineage in the PNG is damaged: its CRC differs")
    try:
        content = json.loads(_text_of(chunk))
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        raise DataError(f"the lineage in the PNG is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError("the lineage in the PNG is JSON, but no object")
    return content


def _text_chunk(text: bytes) -> bytes:
    data = KEYWORD + b"\0" + text
    return struct.pack(">I", len(data)) + b"tEXt" + data + struct.pack(">I", zlib.crc32(b"tEXt" + data))


def _chunks(png: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG until its end; what a file has beyond it is none of it."""
    if not is_png(png):
        raise DataError("it is no PNG: it does not begin like one")
    at, kind, whole = len(SIGNATURE), b"", memoryview(png)
    while kind != b"IEND":
        if at + 12 > len(png):
            raise DataError(f"the PNG is cut off after {len(png)} bytes: it has no IEND")
        length, kind = struct.unpack_from(">I4s", png, at)
        if at + 12 + length > len(png):
            raise DataError(f"the PNG is cut off: its chunk {kind!r} at {at} must have {length} bytes")
        if at == len(SIGNATURE) and kind != b"IHDR":
            raise DataError(f"it is no PNG: its first chunk is {kind!r}, not IHDR")
        crc = struct.unpack_from(">I", png, at + 8 + length)[0]
        yield Chunk(kind, at, whole[at + 8 : at + 8 + length], crc)
        at += 12 + length


def _text_of(chunk: Chunk) -> str:
    """Return the text of a chunk, whichever of the three it is.

    Raises:
        DataError: if it is longer than a stamp may be.
        ValueError: if it is not UTF-8, in which ours is.
    """
    data, compressed = bytes(chunk.data[len(KEYWORD) + 1 : len(KEYWORD) + 1 + MAX_BYTES + 1024]), False
    too_long = DataError(f"the lineage in the PNG is longer than {MAX_BYTES} bytes")
    if len(chunk.data) > len(KEYWORD) + 1 + MAX_BYTES + 1024:
        raise too_long
    if chunk.kind == b"zTXt":  # a method, 0, and the rest
        compressed, data = True, data[1:]
    elif chunk.kind == b"iTXt":  # compressed or not, a method, a language and a translated keyword
        parts = data[2:].split(b"\0", 2)
        if len(parts) < 3:
            raise DataError("the lineage in the PNG is damaged: its iTXt chunk is cut off")
        compressed, data = data[0] != 0, parts[2]
    if compressed:
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(data, MAX_BYTES + 1)  # no bomb goes off: no more than this is unpacked
        except zlib.error as error:
            raise DataError(f"the lineage in the PNG is damaged: {error}") from error
    if len(data) > MAX_BYTES:
        raise too_long
    return data.decode("utf-8")
