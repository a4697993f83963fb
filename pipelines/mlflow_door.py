"""The door to MLflow, which takes seconds to import: behind it only when it is needed, and with its settings made."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.entries import Target, without_password
from pipelines.errors import ConfigurationError
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pipelines.mlflow_run import MLflowRun

TIMEOUT_S = "5"
"""For an answer to a request."""

log = logging.getLogger("brickyard.tracking")


def reach(uri: str) -> str:
    """Return what a tracking URI answers, in a few words, having changed nothing there."""
    if uri == "none":
        return "none"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"{uri}, to be made"
    be_brief()
    from pipelines import mlflow_find

    return f"{without_password(uri)} {mlflow_find.reach(without_password(uri))}"


def recipient_of(target: Target, home: Folder) -> "MLflowRun":
    """Return the MLflow run that a target means."""
    be_brief()
    from pipelines.mlflow_run import MLflowRun

    if target.uri.startswith("sqlite:///"):
        Path(target.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MLflowRun(target, home)


def check_trusted(uri: str) -> None:
    """Check an address that was read from a file, before credentials of the environment, or of MLflow's file, go there.

    Raises:
        ConfigurationError: if there are some, and the environment does not name the address too.
    """
    secret = any(os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("PASSWORD", "TOKEN"))
    secret = secret or Path("~/.mlflow/credentials").expanduser().exists()
    named = without_password(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if secret and uri.startswith("http") and uri.rstrip("/") != named.rstrip("/"):
        raise ConfigurationError(
            f"MLFLOW_TRACKING_URI is {named!r}; the run is recorded at {uri}, which would be sent the password of the "
            f"environment, or of ~/.mlflow/credentials: set MLFLOW_TRACKING_URI={uri} if it may have it"
        )


def named_here(recorded_uri: str, flag: str) -> str:
    """Return the tracker that may be asked, and told: ``none``, unless it is named here.

    What samples or a checkpoint have on record may be a stranger's word: no server is spoken to, and nothing is made,
    where it points to. A database that is there already is taken.

    Args:
        recorded_uri: as the lineage has it.
        flag: ``tracking.uri``, which comes before the environment.
    """
    if named := flag or os.environ.get("MLFLOW_TRACKING_URI", ""):
        return named
    if not recorded_uri.startswith("sqlite:///"):
        return "none"
    try:
        is_here = Path(recorded_uri.removeprefix("sqlite:///")).is_file()
    except OSError:  # it is no path at all
        is_here = False
    return recorded_uri if is_here else "none"


def to_record_at(recorded_uri: str, flag: str) -> str:
    """Return where to record what came of samples or of a checkpoint, as :func:`named_here`; nowhere is said."""
    uri = named_here(recorded_uri, flag)
    if uri == "none" != recorded_uri:
        log.info("not on record; to have it where the training is, set MLFLOW_TRACKING_URI=%s", recorded_uri)
    return uri


def be_brief() -> None:
    """Have MLflow give up soon, say little, and send nothing anywhere unasked."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        # At once, for a server that fails now and then; for one that is away a delivery has a patience of its own.
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0"),
        ("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", TIMEOUT_S),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ):
        os.environ.setdefault(name, value)
    from pipelines import mlflow_find  # noqa: F401  (MLflow sets the level of its own log)

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # of each request that it sends again
