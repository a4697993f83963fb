"""Which run in MLflow is ours. MLflow makes the ids of runs, so ours is found by a tag with an id of our own.

And it is one: where several start at once, or an answer is lost after the deed, a file in the run's folder, which of
several writers one makes, says which run all of them take.
"""

import json
import os
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException
from requests import ConnectionError, HTTPError
from requests.exceptions import ChunkedEncodingError

from pipelines.entries import Target, without_password
from pipelines.errors import DataError
from pipelines.storage import Folder

TAG = "brickyard.run"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""What the UI shows of an experiment first: training, not conversations."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
"""What MLflow says of a request that it will never take, whenever it comes. What stands between, such as a gateway
whose server is away, may answer 400 and 404 too, but not in these words."""


def client(uri: str) -> MlflowClient:
    """Return a client of a tracker. What is kept has no password; where the environment has the address with one, that
    goes to where MLflow looks for it too, and not into its messages, as an address would."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if without_password(given) == uri != given:
        parts = urlsplit(given)
        if not given.startswith("http"):
            return MlflowClient(tracking_uri=given)  # a database, whose driver takes it from here alone
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return MlflowClient(tracking_uri=uri)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow will not take a request, whenever it comes."""
    if isinstance(error, HTTPError) and error.response is not None:  # of a file
        too_large = error.response.status_code == 413
        return too_large or any(f'"{code}"' in error.response.text for code in REFUSALS)
    return isinstance(error, MlflowException) and error.error_code in REFUSALS


def is_final(error: Exception) -> bool:
    """Whether to ask again is in vain: it is refused, or we have no leave to ask."""
    not_ours = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
    return is_refusal(error) or (isinstance(error, MlflowException) and error.error_code in not_ours)


def is_broken_off(error: BaseException) -> bool:
    """Whether the connection broke, and not because of somebody's patience; MLflow's error stands before requests'."""
    cause = error.__cause__ or error.__context__
    return isinstance(cause, ConnectionError | ChunkedEncodingError) and "timed out" not in str(cause)


def is_active(found: Run | Experiment) -> bool:
    """Whether nobody has deleted a run or an experiment."""
    stage = found.info.lifecycle_stage if isinstance(found, Run) else found.lifecycle_stage
    return bool(stage == LifecycleStage.ACTIVE)


class Found(NamedTuple):
    """The run of a target."""

    run: Run
    is_new: bool
    """Whether nothing can be on record yet."""


class Finder:
    """Finds the run of a target, or makes it.

    Args:
        tracker: MLflow.
        target: which run.
        home: the folder of the run.
    """

    def __init__(self, tracker: MlflowClient, target: Target, home: Folder) -> None:
        self._client, self._target, self._home = tracker, target, home
        self._claim = f"mlflow-{target.key}.json"

    def open(self, began_ms: int | None = None) -> Found:
        """Find the run, restore it if somebody has deleted it, or make it.

        Args:
            began_ms: when it has begun if it is new; None: now.

        Raises:
            Exception: whatever the tracker or the storage has.
        """
        claimed = self._claimed()
        run = self.find(claimed) if claimed else None
        if run is None:
            experiment = self._experiment()
            first = next(iter(self._same(experiment)), None)
            made = first or self._client.create_run(
                experiment, began_ms, tags={TAG: self._target.run_id}, run_name=self._target.name
            )
            run = self._agree(made, is_claimed=bool(claimed))
            if first is None and run is made:
                return Found(run, is_new=True)
        if not is_active(run):
            if not is_active(self._client.get_experiment(run.info.experiment_id)):
                self._client.restore_experiment(run.info.experiment_id)
            self._client.restore_run(run.info.run_id)
        return Found(run, is_new=False)

    def find(self, mlflow_id: str) -> Run | None:
        """Return a run by MLflow's id, deleted or not."""
        try:
            return self._client.get_run(mlflow_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def remove_doubles(self, chosen: Run) -> None:
        """Delete what a lost answer, or a starter that was slower, left beside the run: it holds nothing."""
        for run in self._same(chosen.info.experiment_id):
            if run.info.run_id != chosen.info.run_id and not run.data.metrics and not run.data.params:
                self._client.delete_run(run.info.run_id)

    def _experiment(self) -> str:
        name = self._target.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(
                    self._client.create_experiment(name, artifact_location=self._target.artifacts or None, tags=KIND)
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(name)  # somebody was faster
        if not is_active(found):
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _same(self, experiment: str) -> list[Run]:
        return with_tag(self._client, [experiment], self._target.run_id)

    def _claimed(self) -> str:
        """Return MLflow's id of the run that all starters take, or nothing."""
        if not self._home.exists(self._claim):
            return ""
        try:
            return str(json.loads(self._home.get(self._claim))["mlflow_run"])
        except (DataError, ValueError, KeyError, TypeError):
            return ""

    def _agree(self, run: Run, is_claimed: bool) -> Run:
        """Return the run that all starters take: this one, or that of one who was faster.

        Args:
            run: this one.
            is_claimed: whether the file names another, which is no more.
        """
        content = json.dumps({"mlflow_run": run.info.run_id, "run": self._target.run_id}).encode()
        if is_claimed or not (self._home.create(self._claim, content) or self._claimed()):
            self._home.put(self._claim, content)
        chosen = self._claimed()
        return run if chosen in ("", run.info.run_id) else self.find(chosen) or run


def with_tag(tracker: MlflowClient, experiments: list[str], run_id: str, tag: str = TAG) -> list[Run]:
    """Return the runs that have an id of ours, the first one first; deleted ones are left out."""
    words = f"tags.`{tag}` = '{run_id}'"
    return list(tracker.search_runs(experiments, words, ViewType.ACTIVE_ONLY, order_by=["attributes.start_time ASC"]))


def reach(uri: str) -> str:
    """Return what a tracker answers, in a few words, having changed nothing there."""
    try:
        client(uri).search_experiments(max_results=1)
    except Exception as error:
        return f"does not answer, so records would wait on disk: {error}"
    return "answers"


def run_of(tracker: MlflowClient, run_id: str) -> Run:
    """Return the run that has an id of ours, wherever it is; of older versions, MLflow's.

    Raises:
        MlflowException: if there is none.
    """
    token: str | None = ""
    while token is not None:
        page = tracker.search_experiments(page_token=token or None)
        if found := with_tag(tracker, [experiment.experiment_id for experiment in page], run_id):
            return found[0]
        token = page.token or None
    return tracker.get_run(run_id)
