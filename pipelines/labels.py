"""Where the labels of raw images come from: their folders, a column, their samples, a list; or there are none."""

import csv
import io
import logging
from typing import Literal

from pipelines.errors import ConfigurationError, DataError
from pipelines.shards import ahead
from pipelines.sources import Kind, Source
from pipelines.storage import Folder, absolute
from pipelines.stored import Stored

log = logging.getLogger("brickyard.ingest")


def read_labels(url: str) -> dict[str, str]:
    """Read a CSV file with the columns ``path`` and ``label``, as its first line says.

    Raises:
        DataError: if it cannot be read, or is not that.
    """
    parent, _, name = absolute(url).rpartition("/")
    try:
        lines = csv.DictReader(io.StringIO(Folder(f"{parent}/").get(name).decode("utf-8-sig"), newline=""))
        if not {"path", "label"} <= set(lines.fieldnames or []):
            raise DataError(f"{url} begins with {lines.fieldnames}; its first line must name the columns path,label")
        found: dict[str, str] = {}
        for line in lines:
            path, label = line["path"], line["label"]
            if not path or not label:
                raise DataError(f"{url}, line {lines.line_num}, lacks the path or the label: {line}")
            if found.setdefault(path, label) != label:
                raise DataError(f"{url} gives {path} two labels, {found[path]} and {label}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{url} is not a CSV file in UTF-8: {error}") from error
    return found


def whose_labels(said: str, kind: Kind, files: list[Stored]) -> Literal["own", "none", "listed"]:
    """Return where labels come from, as ``ingest.labels`` says: of image files, folders do if all files are in one."""
    if said == "none":
        return "none"
    if said != "folder":
        return "listed"
    strays = [file.name for file in files if kind == "files" and "/" not in file.name]
    if strays and len(strays) < len(files):
        log.warning(
            "%d of %d images lie in no folder, such as %s; therefore no labels are taken: move them into folders, or "
            "set ingest.labels to none",
            len(strays), len(files), ", ".join(strays[:3]),
        )  # fmt: skip
    return "none" if strays else "own"


def check_label_column(source: Source, files: list[Stored]) -> None:
    """Raise ConfigurationError if the label column is in none of these Parquet files; broken ones do not count."""
    known: list[str] = []
    for columns in ahead(source.folder, source.columns, files):
        if source.label_column in columns:
            return
        known = known or columns
    if known:
        raise ConfigurationError(
            f"ingest.label_column is {source.label_column!r}; it must be a column of the Parquet files of "
            f"{source.folder.url}, which have the columns {', '.join(known)}: set it to one of them, or ingest.labels "
            "to none"
        )


def sorted_labels(labels: set[str]) -> list[str]:
    """Sort labels, those that are whole numbers by their value."""
    return sorted(labels, key=lambda name: (int(name) if name.isascii() and name.isdigit() else -1, name))
