"""Scores of networks that were trained before, on record; and the best of them, which is the champion."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.entries import without_password
from pipelines.errors import BrickyardError, TryAgainError
from pipelines.features import FeatureConfig
from pipelines.mlflow_door import be_brief

log = logging.getLogger("brickyard.scoring")


def suffix(features: FeatureConfig, reference_digest: str, lineage: dict[str, Any]) -> str:
    """Return what the names of scores have behind them on record: by other features, or against other data than the
    network learned from, they are no points of one curve."""
    same = reference_digest == lineage.get("data_digest")
    return features.suffix + ("" if same else f"_against_{reference_digest[:8]}")


def record_score(uri: str, run_id: str, metric: str, value: float, lineage: dict[str, Any]) -> bool:
    """Write one score to a run that has ended. Return whether it was taken; a failing tracker is said, not raised.

    Args:
        uri: of the tracker.
        run_id: our own id of the run.
        metric: the name of the score.
        value: of it.
        lineage: of the samples that it is of.
    """

    def write(client: Any, run: Any) -> None:
        from pipelines import mlflow_models

        mlflow_models.record_score(client, run, metric, value, lineage)

    return _write(uri, run_id, metric, write)


def record_file(uri: str, run_id: str, name: str, data: bytes) -> bool:
    """Add a file to a run that has ended. Return whether it was taken; a failing tracker is said, not raised."""

    def write(client: Any, run: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_bytes(data)
            client.log_artifact(run.info.run_id, str(Path(folder) / name))

    return _write(uri, run_id, name, write)


def _write(uri: str, run_id: str, what: str, write: Callable[[Any, Any], None]) -> bool:
    if uri in ("", "none") or not run_id:
        return False
    be_brief()
    from pipelines import mlflow_find

    try:
        client = mlflow_find.client(without_password(uri))
        write(client, mlflow_find.run_of(client, run_id))
    except Exception as error:
        log.warning("MLflow at %s did not take %s: %s", without_password(uri), what, error)
        return False
    return True


def promote(uri: str, run_id: str, name: str, result: dict[str, Any], metric: str) -> dict[str, Any]:
    """Make the network of a score the champion of a registered model, if it is better than the one that is.

    Args:
        uri: of the tracker.
        run_id: our own id of the run.
        name: of the registered model.
        result: what :func:`pipelines.scoring.score` returns.
        metric: the name of the score in it.

    Returns:
        ``promoted``, and ``why`` or why not.

    Raises:
        BrickyardError: if the tracker will not do as it is told.
        TryAgainError: if it may later.
    """
    be_brief()
    from pipelines import mlflow_find, mlflow_models

    try:
        client = mlflow_find.client(without_password(uri))
        verdict = mlflow_models.promote(client, mlflow_find.run_of(client, run_id), name, result, metric)
    except Exception as error:
        said = f"MLflow at {without_password(uri)} did not promote a version of {name!r}: {error}"
        if mlflow_find.is_final(error):
            raise BrickyardError(said) from error
        raise TryAgainError(f"{said}; run the same command again") from error
    return {"promoted": verdict.promoted, "why": verdict.why}
