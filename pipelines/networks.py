"""The network that a sampling job asks for: in a folder, or by an address of MLflow's."""

import logging
import os
from dataclasses import dataclass

from pipelines.entries import ABOUT, without_password
from pipelines.errors import BrickyardError, ConfigurationError, DataError, OtherFormatError, TryAgainError
from pipelines.lineage import Trained
from pipelines.mlflow_door import be_brief
from pipelines.storage import Folder

log = logging.getLogger("brickyard.sampling")


@dataclass(frozen=True)
class Asked:
    """A network, found and verified, and how it was asked for."""

    trained: Trained
    address: str
    """As it was asked for."""
    model_id: str = ""
    """MLflow's, of a logged model; empty if it was asked for by its folder."""
    version: str = ""
    """NAME/VERSION in MLflow's registry."""


def is_address(checkpoint: str) -> bool:
    """Whether a network is asked for by an address of MLflow's."""
    return checkpoint.startswith(("models:/", "runs:/"))


def find(checkpoint: str, uri: str, keep: Folder, meant: dict[str, str] | None = None) -> Asked:
    """Find the network that a job asks for.

    Args:
        checkpoint: a folder, or an address.
        uri: of the tracker; empty for the environment's.
        keep: where to put the weights if MLflow alone has them.
        meant: model_id, version, checkpoint and digest, as the address was understood before; what it means may change.

    Raises:
        ConfigurationError, DataError: if there is none.
        TryAgainError: if MLflow does not answer.
    """
    if not is_address(checkpoint):
        begun = _still_there(meant["checkpoint"], meant["digest"]) if meant and "digest" in meant else None
        return Asked(begun or Trained.find(checkpoint), checkpoint)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri in ("", "none"):
        raise ConfigurationError(
            f"checkpoint is {checkpoint!r}, and tracking.uri is empty: give --tracking.uri or set MLFLOW_TRACKING_URI"
        )
    be_brief()
    from pipelines import mlflow_find, mlflow_registry

    shown = without_password(uri)
    try:
        client = mlflow_find.client(shown)
        if meant and meant.get("model_id"):
            model = mlflow_registry.look_up(client, f"models:/{meant['model_id']}")
        else:
            model = mlflow_registry.look_up(client, checkpoint)
        trained = _still_there(model.checkpoint, model.digest)
        if trained is None:
            folder = keep / f"model-{model.digest[:12]}"
            if not folder.exists(ABOUT):  # which comes last
                log.info("%s is no more; MLflow's copy of the weights is taken", model.checkpoint or "the checkpoint")
                mlflow_registry.bring(client, model.model_id, folder)
            trained = Trained.find(folder.url)
    except BrickyardError:
        raise
    except Exception as error:
        said = f"MLflow at {shown} does not tell what {checkpoint} is: {error}"
        if mlflow_find.is_final(error):
            raise BrickyardError(said) from error
        raise TryAgainError(f"{said}; run the same command again") from error
    if trained.digest != model.digest:
        raise DataError(
            f"{trained.folder.url} is not the checkpoint that MLflow knows as {checkpoint}: its digest differs"
        )
    return Asked(trained, checkpoint, model.model_id, model.version or (meant or {}).get("version", ""))


def _still_there(checkpoint: str, digest: str) -> Trained | None:
    """Return a checkpoint if it still is where it was, and what it was."""
    try:
        trained = Trained.find(checkpoint) if checkpoint else None
    except (DataError, OtherFormatError):
        return None
    return trained if trained and trained.digest == digest else None
