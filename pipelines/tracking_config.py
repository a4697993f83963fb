"""Where runs are recorded, as a user says it."""

from dataclasses import dataclass

from pipelines.entries import without_password
from pipelines.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = ""
    """An MLflow tracking URI, or `none`. Empty: MLFLOW_TRACKING_URI if that is set; else, for what is trained, SQLite
    in the root, and for what is made of a network, the database of its training if that is on this machine."""
    experiment: str = "brickyard"
    """The MLflow experiment."""
    log_model: bool = True
    """Keep the averaged weights in MLflow too, at the end of a run, as a logged model: safetensors and JSON."""
    register: str = ""
    """Name of a registered model: the logged model becomes a version of it, and its `candidate`. None if empty."""
    parent: str = ""
    """The id of the run that this one is a child of, as jobs/sweep.py sets it."""
    spool_mb: int = 256
    """What is to be recorded waits on disk while the tracker is away, up to so many MB; what does not fit is lost,
    and that is said."""

    def __post_init__(self) -> None:
        if self.spool_mb < 1:
            raise ConfigurationError(f"tracking.spool_mb is {self.spool_mb}; it must be at least 1: try 256")
        check_model_name("tracking.register", self.register)
        if without_password(self.uri) != self.uri:
            raise ConfigurationError(
                "tracking.uri holds a user or a password, and configurations are printed and kept: leave that out and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )


def check_model_name(setting: str, name: str) -> None:
    """Raise ConfigurationError if MLflow would not take the name of a registered model."""
    if any(character in name for character in "/:'\""):
        raise ConfigurationError(
            f"{setting} is {name!r}; the name of a model has no '/', no ':' and no quotes, such as digits"
        )
