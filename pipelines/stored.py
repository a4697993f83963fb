"""What a listing finds, and what tells two contents of one name apart."""

from typing import Any, NamedTuple


class Stored(NamedTuple):
    """An object that was found."""

    name: str
    """Relative to the folder."""
    size_bytes: int
    version: str
    """Changes when the content does: the ETag of an object store, the time of the last change of a file."""


def version_of(info: dict[str, Any]) -> str:
    """Return the version of an object as its storage client words it; nothing if it has none."""
    for word in ("ETag", "etag", "mtime", "md5Hash", "generation", "LastModified"):
        if word in info:
            return str(info[word]).strip('"')
    return ""
