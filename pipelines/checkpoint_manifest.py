"""What the manifest of a checkpoint says."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.errors import DamagedError, OtherFormatError

FORMAT = 1
"""Of the files and of the manifest: to be raised when this code would misunderstand what an older one wrote."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint's manifest."""

    position: int
    """Images seen: where the stream goes on."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and sha256 of each file."""
    config: dict[str, Any]
    """The resolved configuration of the run, as it is written to YAML."""
    data_digest: str
    data_url: str
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    labels: list[str]
    tracking_uri: str
    tracking_run: str
    """Our own id of the run, by which it is found in the tracker."""
    git_revision: str
    snapshots: list[str] = field(default_factory=list)
    """Names of the run's power-function averages until here."""

    @property
    def digest(self) -> str:
        """The sha256 of the manifest's content; it names these weights in every lineage."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Return what :func:`parse` reads."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1).encode()


def parse(text: bytes, url: str) -> Checkpoint:
    """Read a manifest.

    Raises:
        DamagedError: if it is none.
        OtherFormatError: if it has another format. It is whole then, so it must not be passed over, or what comes
            after it would be swept.
    """
    try:
        told = json.loads(text)
    except ValueError as error:
        raise DamagedError(f"{url} is not the manifest of a checkpoint: {error}") from error
    if isinstance(told, dict) and (other := told.get("format", 1)) != FORMAT:
        raise OtherFormatError(
            f"{url} has format {other}, and this version of the code knows {FORMAT}: go on with the one that wrote it, "
            f"revision {told.get('git_revision', 'unknown')}, or begin another run by another --name"
        )
    try:
        return TypeAdapter(Checkpoint).validate_python(told)
    except ValidationError as error:
        raise DamagedError(f"{url} is not the manifest of a checkpoint: {error}") from error
