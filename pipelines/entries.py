"""What there is to record of a run, and where: plain values that go through a spool as JSON and bytes."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit, urlunsplit

ABOUT = "config.json"
"""The file of a model that says what it is, and of which checkpoint."""
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Begin:
    """A start of the run."""

    start: int
    """Which one, from 1."""
    at_ms: int


@dataclass(frozen=True)
class Parameters:
    """Settings of the run; one that is on record keeps its value."""

    values: dict[str, str]


@dataclass(frozen=True)
class Metrics:
    """Values at a position. The time is that of the measurement, so that a second delivery is the same record."""

    values: dict[str, float]
    position: int
    at_ms: int
    anew: bool = False
    """Whether they replace others at their position; otherwise what is computed again is not recorded again."""


@dataclass(frozen=True)
class Tags:
    """Tags, as a start sets them."""

    values: dict[str, str]
    start: int


@dataclass(frozen=True)
class Picture:
    """A picture at a position, as PNG."""

    key: str
    position: int
    at_ms: int
    data: bytes


@dataclass(frozen=True)
class File:
    """A file, as a start has it; the name may have folders before it."""

    name: str
    start: int
    data: bytes


@dataclass(frozen=True)
class DataSet:
    """What the run learns from."""

    name: str
    digest: str
    source: str
    """Its URL."""
    profile: dict[str, Any]
    """Figures about it."""


@dataclass(frozen=True)
class Model:
    """Weights of the run. They lie in a folder of the run, and are read when they are delivered."""

    name: str
    digest: str
    """Of the checkpoint."""
    checkpoint: str
    """Its URL."""
    folder: str
    files: list[str]
    size_bytes: int
    """Of these files."""
    position: int
    at_ms: int
    metrics: dict[str, float]
    data_name: str
    data_digest: str
    register: str
    """The registered model that it is to be a version of; empty: of none."""


@dataclass(frozen=True)
class ModelInput:
    """A model that the run makes use of."""

    name: str
    """As it was asked for."""
    model_id: str
    """MLflow's."""


@dataclass(frozen=True)
class End:
    """The end of a start."""

    status: Status
    at_ms: int
    start: int
    dropped: int
    """Entries that did not fit since the spool was made."""


Entry: TypeAlias = Begin | Parameters | Metrics | Tags | Picture | File | DataSet | Model | ModelInput | End
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Begin, Parameters, Metrics, Tags, Picture, File, DataSet, Model, ModelInput, End)
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the entries of a spool belong."""

    uri: str
    """Of the tracker, without a password."""
    experiment: str
    artifacts: str
    """Where a new experiment keeps its files; empty: where the tracker says."""
    name: str
    """Of the run, to be shown."""
    run_id: str
    """Our own id of the run."""
    parent: str = ""
    """Of the run that this one is a child of."""

    @property
    def key(self) -> str:
        """Names this run at this tracker, in the names of files."""
        return hashlib.sha256(f"{self.run_id} {self.uri}".encode()).hexdigest()[:8]


def without_password(uri: str) -> str:
    """Return a URI that can be printed and kept: without the user and the password that it may carry."""
    parts = urlsplit(uri)
    kept = "&".join(one for one in parts.query.split("&") if not one.startswith("password="))
    if "@" not in parts.netloc and kept == parts.query:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=kept))
