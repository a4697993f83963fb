"""Which network an address of MLflow's means, and what MLflow has of it."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from pipelines.entries import ABOUT
from pipelines.environment import environment
from pipelines.errors import ConfigurationError
from pipelines.mlflow_models import DIGEST, MODEL, NOT_THERE
from pipelines.storage import Folder

ADDRESS = re.compile(
    r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))|models:/(?P<id>m-\w+)|runs:/(?P<run>[^/@]+)"
)
HOW = "give models:/NAME@ALIAS, models:/NAME/VERSION, or runs:/RUN with MLflow's id of a run"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A logged model."""

    model_id: str
    """MLflow's."""
    version: str
    """NAME/VERSION in the registry; empty if it was not found there."""
    digest: str
    """Of its checkpoint."""
    checkpoint: str
    """The URL of its checkpoint, which may be gone by now."""


def look_up(client: MlflowClient, address: str) -> Registered:
    """Find the model that an address means.

    Raises:
        ConfigurationError: if it is no address, or means nothing.
        MlflowException: if MLflow does not answer.
    """
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigurationError(f"checkpoint is {address!r}, which is no address of MLflow's: {HOW}")
    try:
        version = ""
        if found["run"]:
            model = _newest_of(client, found["run"], address)
        elif found["id"]:
            model = client.get_logged_model(found["id"])
        else:
            name = found["name"]
            one = (
                client.get_model_version_by_alias(name, found["alias"])
                if found["alias"]
                else client.get_model_version(name, found["version"])
            )
            version = f"{name}/{one.version}"
            if MODEL not in one.tags:
                raise ConfigurationError(
                    f"checkpoint is {address!r}; version {one.version} of {name} is of no run of ours: register "
                    "one by --tracking.register"
                )
            model = client.get_logged_model(one.tags[MODEL])
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        raise ConfigurationError(
            f"checkpoint is {address!r}; MLflow at {client.tracking_uri} has none: {error}"
        ) from error
    return Registered(
        model_id=model.model_id,
        version=version,
        digest=model.tags.get(DIGEST, ""),
        checkpoint=model.tags.get("brickyard.checkpoint", ""),
    )


def _newest_of(client: MlflowClient, run_id: str, address: str) -> LoggedModel:
    run = client.get_run(run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    ours = [model for model in models if DIGEST in model.tags]
    if not ours:
        raise ConfigurationError(
            f"checkpoint is {address!r}; that run has no model in MLflow (tracking.log_model, at its end): give the "
            "folder of the run"
        )
    return max(ours, key=lambda model: int(model.params["images"]))


def bring(client: MlflowClient, model_id: str, to: Folder) -> None:
    """Copy what MLflow has of a model into a folder; what says what it is comes last."""
    # A database looks for the model at the process's own address (3.17).
    with tempfile.TemporaryDirectory() as temporary, environment({"MLFLOW_TRACKING_URI": client.tracking_uri}):
        mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model_id}", dst_path=temporary)
        files = [path for path in Path(temporary).rglob("*") if path.is_file() and path.name != "MLmodel"]
        for path in sorted(files, key=lambda path: path.name == ABOUT):
            to.put(path.name, path.read_bytes())
