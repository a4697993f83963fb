"""What a run learned from, and what came of it, told to MLflow: data sets, models, and which model is the champion.

A logged model is the averaged weights as safetensors with their ``config.json``: no pickle, no code. It is known by the
digest of its checkpoint, so to tell MLflow of it twice changes nothing.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Run,
)
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis

from pipelines.entries import ABOUT, DataSet, Model, ModelInput
from pipelines.environment import environment
from pipelines.storage import Folder

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
BYTES_PER_S = 1e6
"""What is waited for at least."""
DIGEST = "brickyard.checkpoint_digest"
MODEL = "brickyard.model"
"""MLflow's id of the logged model that a version is."""
CHAMPION, CANDIDATE = "champion", "candidate"
"""Aliases of a registered model: the best by its score, and the newest."""
MEASURED_ON = ("reference_digest", "features", "samples_n", "seeds", "draw")
"""What two scores must have in common to be compared."""
NOT_THERE = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""What MLflow says of a registered model, or of an alias, that there is not."""

log = logging.getLogger("brickyard.tracking")


class Verdict(NamedTuple):
    """Whether a model has become the champion."""

    promoted: bool
    why: str


def record_data_set(client: MlflowClient, run: Run, data: DataSet) -> None:
    """Say what a run learns from; MLflow knows the same data set by its digest."""
    described = Dataset(
        name=data.name,
        digest=data.digest[:36],  # what MLflow keeps of one
        source_type=data.source.partition(":")[0],
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(data.profile),
    )
    tags = [InputTag("mlflow.data.context", "training"), InputTag("brickyard.digest", data.digest)]
    client.log_inputs(run.info.run_id, [DatasetInput(described, tags)])


def record_model(client: MlflowClient, run: Run, model: Model) -> None:
    """Record a model with its measurements, and register it if it is to be; not if its folder has others by now."""
    folder = Folder(model.folder)
    if any(Path(name).name != name for name in model.files) or not model.digest:  # it comes out of a file
        log.warning("%s is no model of ours, which is not on record", model.files)
        return
    if (other := json.loads(folder.get(ABOUT)).get("checkpoint_digest")) != model.digest:
        log.warning("%s holds another checkpoint by now (%s): that of %d images is not on record as a model",
                    folder.url, other, model.position)  # fmt: skip
        return
    found = find_model(client, run, model.digest) or client.create_logged_model(
        run.info.experiment_id,
        name=model.name.replace(".", "-"),  # the one character of ours that MLflow has another use for
        source_run_id=run.info.run_id,
        tags={DIGEST: model.digest, "brickyard.checkpoint": model.checkpoint},
        params={"images": str(model.position), "data_digest": model.data_digest},
        model_type="noise predictor",
    )
    if found.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as temporary:
            for name in model.files:
                (Path(temporary) / name).write_bytes(folder.get(name))
            with _patience(sum(path.stat().st_size for path in Path(temporary).iterdir())):
                client.log_model_artifacts(found.model_id, temporary)
        if found.model_id not in {one.model_id for one in run.outputs.model_outputs}:
            client.log_outputs(run.info.run_id, [LoggedModelOutput(found.model_id, model.position)])
        client.finalize_logged_model(found.model_id, LoggedModelStatus.READY)  # last: ready is done
    record_metrics(client, run, found, model.metrics, model.position, model.at_ms, model.data_name, model.data_digest)
    if model.register:
        version = _version_of(client, run, found, model.register)
        client.set_registered_model_alias(model.register, CANDIDATE, version.version)


def record_model_input(client: MlflowClient, run: Run, model: ModelInput) -> None:
    """Say once that a run makes use of a model."""
    if model.model_id not in {one.model_id for one in run.inputs.model_inputs}:
        client.log_inputs(run.info.run_id, models=[LoggedModelInput(model.model_id)])


def record_metrics(
    client: MlflowClient,
    run: Run,
    model: LoggedModel,
    values: dict[str, float],
    position: int,
    at_ms: int,
    data_name: str,
    data_digest: str,
) -> None:
    """Record measurements of a model on a data set; those that it has are left.

    MLflow records them of the run too, so they take the time of what the run has: then they are one and the same.
    """
    new = []
    for key, value in values.items():
        if not _has(model.metrics or [], key, position, value):
            history = client.get_metric_history(run.info.run_id, key)
            one = _has(history, key, position, value) or Metric(key, value, at_ms, position)
            new.append(Metric(key, one.value, one.timestamp, position, model.model_id, data_name, data_digest[:36]))
    if new:
        client.log_batch(run.info.run_id, metrics=new)


def record_score(client: MlflowClient, run: Run, metric: str, value: float, lineage: dict[str, Any]) -> None:
    """Write one score, once, to a run that has ended, and to its model if the score is of that."""
    position, run_id = lineage["position"], run.info.run_id
    if not _has(client.get_metric_history(run_id, metric), metric, position, value):
        client.log_metric(run_id, metric, value, step=position)
    model = find_model(client, run, lineage["checkpoint_digest"])
    if model and _is_of_the_model(lineage):
        data = lineage["data_digest"]
        name = Folder(lineage["data_url"]).name
        record_metrics(client, run, model, {metric: value}, position, get_current_time_millis(), name, data)


@contextmanager
def _gone_already() -> Iterator[None]:
    """Within this context it is well that what is to be deleted is not there: an answer may be lost again."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise


def _has(metrics: list[Metric], key: str, position: int, value: float) -> Metric | None:
    """Return the value among metrics, if it is there."""
    same = (one for one in metrics if (one.key, one.step) == (key, position))
    return next((one for one in same if math.isclose(one.value, value, rel_tol=1e-12)), None)


@contextmanager
def _patience(size_bytes: int) -> Iterator[None]:
    """Within this context a request may take as long as so many bytes need: the answer comes when they are stored."""
    allowed_s = int(int(os.environ.get(TIMEOUT, "5")) + size_bytes / BYTES_PER_S)
    with environment({TIMEOUT: str(allowed_s)}):
        yield


def find_model(client: MlflowClient, run: Run, digest: str) -> LoggedModel | None:
    """Return the model of a run that was made of a checkpoint."""
    words = f"tags.`{DIGEST}` = '{digest}' AND source_run_id = '{run.info.run_id}'"
    same = client.search_logged_models([run.info.experiment_id], words)
    best, *others = sorted(same, key=lambda one: one.status != LoggedModelStatus.READY) or [None]
    for other in others:  # a lost answer leaves one that nobody knows of
        if other.status != LoggedModelStatus.READY:
            with _gone_already():
                client.delete_logged_model(other.model_id)
    return best


def promote(client: MlflowClient, run: Run, name: str, result: dict[str, Any], metric: str) -> Verdict:
    """Make the model that a score is of the champion, if the score is better than the champion's on the same terms.

    Args:
        client: of MLflow.
        run: the run that trained the network.
        name: of the registered model; it is made if there is none.
        result: what :func:`pipelines.scoring.score` returns.
        metric: the name of the score in it; less is better.
    """
    digest, score = result["lineage"]["checkpoint_digest"], result[metric]
    model, champion = find_model(client, run, digest), _champion(client, name)
    if model is None:
        return Verdict(False, f"MLflow has no model of {result['lineage']['checkpoint']}: score the newest checkpoint")
    if why_not := _objection(champion, model, result, metric):
        return Verdict(False, why_not)
    version = _version_of(client, run, model, name)
    for key, value in {"score": repr(score), "metric": metric, **_terms(result)}.items():
        client.set_model_version_tag(name, version.version, f"brickyard.{key}", value)
    client.set_registered_model_alias(name, CHAMPION, version.version)
    before = (
        f"there was no other {CHAMPION}" if champion is None
        else f"it was so already, with {champion.tags.get('brickyard.score')}" if _is(champion, model)
        else f"version {champion.version}, the {CHAMPION} until now, has {float(champion.tags['brickyard.score']):.6g}"
    )  # fmt: skip
    return Verdict(True, f"version {version.version} is the {CHAMPION}: {metric} is {score:.6g}; {before}")


def _objection(champion: ModelVersion | None, model: LoggedModel, result: dict[str, Any], metric: str) -> str:
    """Return why a model does not become the champion; nothing if it does. The champion itself may be scored anew, on
    other terms: then those are what others are held against."""
    score, terms = result[metric], _terms(result)
    if not _is_of_the_model(result["lineage"]):
        return (
            "the samples are of other weights than those of the model, which are the average: score samples that were "
            "drawn with --draw.weights ema and no --draw.ema-std"
        )
    if math.isnan(score):
        return f"{metric} is {score}"
    if champion is None or _is(champion, model):
        return ""
    theirs = {key: champion.tags.get(f"brickyard.{key}", "nothing") for key in terms}
    differing = [f"{key} {theirs[key]}, not {terms[key]}" for key in terms if theirs[key] != terms[key]]
    if differing:
        return f"version {champion.version}, the {CHAMPION}, was scored on {'; '.join(differing)}: score both alike"
    if not score < (best := float(champion.tags["brickyard.score"])):
        return f"{metric} is {score:.6g}; version {champion.version}, the {CHAMPION}, has {best:.6g}"
    return ""


def _is_of_the_model(lineage: dict[str, Any]) -> bool:
    """Whether samples were drawn with the weights that are kept as a model."""
    return lineage["draw"].get("weights", "ema") == "ema" and not lineage["draw"].get("ema_std")


def _terms(result: dict[str, Any]) -> dict[str, str]:
    """Return what two scores must have in common to be compared, as JSON."""
    draw = {key: value for key, value in result["lineage"]["draw"].items() if key != "batch_images"}
    return {key: json.dumps({**result, "draw": draw}[key]) for key in MEASURED_ON}


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return None


def _version_of(client: MlflowClient, run: Run, model: LoggedModel, name: str) -> ModelVersion:
    """Return the version of a registered model that is this model; it is made if there is none."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    same = [one for one in client.search_model_versions(f"name = '{name}'") if _is(one, model)]
    source, tags = f"models:/{model.model_id}", {MODEL: model.model_id}
    if not same:
        with environment({"MLFLOW_TRACKING_URI": client.tracking_uri}):  # a database looks for the model there (3.17)
            client.create_model_version(name, source, run.info.run_id, tags=tags, model_id=model.model_id)
        same = [one for one in client.search_model_versions(f"name = '{name}'") if _is(one, model)]
    first, *others = sorted(same, key=lambda one: int(one.version))
    for other in others:  # after a lost answer the request was sent again
        with _gone_already():
            client.delete_model_version(name, other.version)
    return first


def _is(version: ModelVersion, model: LoggedModel) -> bool:
    return bool(version.tags.get(MODEL) == model.model_id)  # what is searched for comes without its model_id
