"""Scores end to end, on Ray, held against numpy on all pictures at once."""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.data import DataContext
from torch import Tensor, nn

from jobs import score as job
from pipelines.errors import ConfigurationError, DataError
from pipelines.features import FeatureConfig, pixel_features
from pipelines.manifest import Manifest
from pipelines.moments import Moments, frechet_distance
from pipelines.score_config import ScoreJob
from pipelines.scoring import dry_run, score, score_job
from pipelines.storage import Folder
from pipelines.tracking import open_tracker, resolve_uri
from pipelines.tracking_config import TrackingConfig
from tests.pipelines.sets import write_data, write_samples
from tests.pipelines.test_pairs import measure

pytestmark = pytest.mark.ray
ALL: tuple[Any, ...] = ("frechet", "kid", "precision-recall", "density-coverage")


class Halves(nn.Module):
    """Features that a test can compute by itself: the means of the upper and of the lower half, and of all squares."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, :, :4].mean((1, 2, 3)), x[:, :, 4:].mean((1, 2, 3)), x.square().mean((1, 2, 3))], 1)


@pytest.fixture(scope="module")
def pixels(digits: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Samples that are like digits, but not quite; labels cycle, as those of samples do."""
    image, label = digits
    order = np.concatenate([np.flatnonzero(label == i % 10)[i // 10 : i // 10 + 1] for i in range(300)])
    return {
        "samples": (image[order] * 0.85 + 12).astype(np.uint8),
        "label": label[order],
        "data": image[900:1600],
        "of": label[900:1600],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, pixels: dict[str, Any]) -> Folder:
    root = Folder(str(tmp_path_factory.mktemp("scores")))
    manifest = write_data(root / "data", pixels["data"], pixels["of"])
    lineage = {"data_url": (root / "data").url, "data_digest": manifest.digest}
    write_samples(root / "samples", pixels["samples"], pixels["label"], shard=64, **lineage)
    return root


@pytest.fixture(scope="module")
def in_order(root: Folder) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of the data set and their labels, as an ingest shuffled them."""
    manifest = Manifest.load(root / "data")
    found = manifest.read(root / "data", np.arange(manifest.rows))
    return found.image, found.label


@pytest.fixture(scope="module")
def everything(root: Folder) -> dict[str, Any]:
    return score(ScoreJob(samples=(root / "samples").url, metrics=ALL, neighbours=3, per_class=True))


def test_every_score_is_that_of_numpy_on_all_pictures_at_once(
    everything: dict[str, Any], pixels: dict[str, Any], in_order: tuple[np.ndarray, np.ndarray]
) -> None:
    a, b = pixel_features(pixels["samples"]), pixel_features(in_order[0])
    assert everything["frechet_distance"] == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-6)
    tables = measure(a.astype(np.float32), b.astype(np.float32), 3, ([], []))
    assert everything["kid"] == pytest.approx(tables.kid(), rel=1e-9)
    found = [everything[name] for name in ("precision", "recall", "density", "coverage")]
    expected = [tables.precision(), tables.recall(), tables.density(3), tables.coverage()]
    assert found == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0 and max(expected) < 1
    for name in range(10):
        of_one = [Moments.of(x[label == name]) for x, label in ((a, pixels["label"]), (b, in_order[1]))]
        assert everything["per_class"][str(name)] == pytest.approx(frechet_distance(*of_one), rel=1e-6)


def test_the_intervals_are_those_of_sets_without_a_tenth(
    everything: dict[str, Any], pixels: dict[str, Any], in_order: tuple[np.ndarray, np.ndarray]
) -> None:
    a, b = pixel_features(pixels["samples"]), pixel_features(in_order[0])
    tenths = [np.arange(300)[30 * i : 30 * (i + 1)] for i in range(10)]
    real = Moments.of(b)
    without = [frechet_distance(Moments.of(np.delete(a, tenth, axis=0)), real) for tenth in tenths]
    error = np.sqrt(0.9 * np.square(without - np.mean(without)).sum())
    assert everything["standard_errors"]["frechet_distance"] == pytest.approx(error, rel=1e-6)
    low, high = everything["intervals"]["frechet_distance"]
    assert low < everything["frechet_distance"] < high
    assert set(everything["intervals"]) == {"frechet_distance", "kid", "precision", "density", "coverage"}


def test_what_was_measured_on_is_on_record(everything: dict[str, Any], root: Folder) -> None:
    assert (everything["samples_n"], everything["reference_n"], everything["pairs_n"]) == (300, 700, [300, 700])
    assert everything["seeds"] == [0, 299] and everything["features"] == "pixels in [0, 1]"
    assert everything["reference_digest"] == Manifest.load(root / "data").digest
    assert everything["same_data_as_trained_on"] and everything["neighbours"] == 3
    assert json.loads(json.dumps(everything)) == everything


def test_a_reference_is_gone_through_once(root: Folder, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    asked = ScoreJob(samples=(root / "samples").url, cache=folder.url)
    first, second = score(asked), score(asked)
    assert not first["reference_cached"] and second["reference_cached"]
    assert second["frechet_distance"] == first["frechet_distance"]
    (name,) = folder.names()
    path = Path(folder.path(name))
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        third = score(asked)
    assert "made anew" in caplog.text and not third["reference_cached"]
    assert third["frechet_distance"] == first["frechet_distance"] and score(asked)["reference_cached"]


def test_a_program_in_a_file_makes_the_features(
    root: Folder, folder: Folder, pixels: dict[str, Any], in_order: tuple[np.ndarray, np.ndarray]
) -> None:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Halves(), (torch.zeros(50, 1, 8, 8),)), buffer)
    folder.put("halves.pt2", buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    features = FeatureConfig(kind="file", url=f"{folder.url}/halves.pt2", sha256=sha256, low=0, high=1, batch_images=50)
    found = score(ScoreJob(samples=(root / "samples").url, features=features, metrics=("frechet", "kid")))

    def halves(image: np.ndarray) -> np.ndarray:
        x = image[..., 0] / 255
        return np.stack([x[:, :4].mean((1, 2)), x[:, 4:].mean((1, 2)), np.square(x).mean((1, 2))], 1)

    a, b = halves(pixels["samples"]), halves(in_order[0])
    assert found["frechet_distance"] == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-4)
    assert found["kid"] == pytest.approx(measure(a, b, 1, ([], [])).kid(), rel=1e-4)
    assert sha256 in found["features"]
    with pytest.raises(ConfigurationError, match="and is not run"):
        folder.put("halves.pt2", b"other")
        score(ScoreJob(samples=(root / "samples").url, features=features))


def test_an_error_of_the_file_is_told_as_ours(
    root: Folder, folder: Folder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataContext.get_current(), "raise_original_map_exception", True)  # as a cluster of our own has
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Conv2d(3, 1, 1), (torch.zeros(64, 3, 8, 8),)), buffer)
    folder.put("rgb.pt2", buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    file = ["--features.kind", "file", "--features.url", f"{folder.url}/rgb.pt2", "--features.sha256", sha256]
    assert job.main(["--samples", (root / "samples").url, *file]) == 3
    assert "rgb.pt2 does not take [64, 1, 8, 8]" in json.loads(capsys.readouterr().out)["error"]


def test_two_sets_of_samples_and_two_data_sets_are_compared_too(root: Folder, folder: Folder) -> None:
    samples, data = (root / "samples").url, (root / "data").url
    one = score_job(ScoreJob(samples=samples, reference=data, cache="none"))
    other = score_job(ScoreJob(samples=data, reference=samples, cache=folder.url))
    assert other["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-6)
    assert other["seeds"] == [] and other["lineage"] == {} and not other["recorded"]
    same = score_job(ScoreJob(samples=samples, reference=samples, cache=folder.url))
    assert abs(same["frechet_distance"]) < 1e-6 and same["reference_cached"]
    with pytest.raises(ConfigurationError, match=r"promote is 'm'; a champion is the network of samples .* no samples"):
        score_job(ScoreJob(samples=data, reference=samples, promote="m"))
    with pytest.raises(ConfigurationError, match=r"promote is 'm'; a champion .* held against data, and .* is no data"):
        score_job(ScoreJob(samples=samples, reference=samples, promote="m"))


@pytest.mark.parametrize(
    ("recorded", "environment", "message"),
    [
        ({"tracking_uri": "none", "tracking_run": "an id"}, "", "is in no MLflow, so it has no model to promote"),
        ({"tracking_uri": "http://a.example", "tracking_run": ""}, "http://a.example", "is in no MLflow"),
        ({"tracking_uri": "http://a.example", "tracking_run": "an id"}, "", "set MLFLOW_TRACKING_URI=http://a.example"),
    ],
)
def test_what_could_never_be_promoted_is_not_measured_first(
    root: Folder, folder: Folder, pixels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recorded: dict[str, str],
    environment: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    samples = write_samples(folder, pixels["samples"], data_url=(root / "data").url, **recorded)
    with pytest.raises(ConfigurationError, match=message):
        dry_run(ScoreJob(samples=samples.url, promote="m"))


def test_some_pictures_of_each_set_may_stand_for_all(root: Folder) -> None:
    found = score(ScoreJob(samples=(root / "samples").url, metrics=("kid",), pairs_images=12))
    assert found["pairs_n"] == [12, 12] and "frechet_distance" not in found
    again = score(ScoreJob(samples=(root / "samples").url, metrics=("kid",), pairs_images=12))
    assert again["kid"] == found["kid"]


def test_what_cannot_be_measured_is_refused_before_a_cluster_starts(root: Folder, folder: Folder) -> None:
    few = write_samples(folder, np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(DataError, match="precision-recall of sets of 4 and 700 pictures needs 6 in each"):
        score(ScoreJob(samples=few.url, reference=(root / "data").url, metrics=("precision-recall",)))
    with pytest.raises(DataError, match="per_class needs two sets with the same labels"):
        score(ScoreJob(samples=few.url, reference=(root / "data").url, per_class=True))


def test_the_job_says_what_it_did_and_what_it_would_do(root: Folder, capsys: pytest.CaptureFixture) -> None:
    argv = ["--samples", (root / "samples").url, "--metrics", "frechet", "density-coverage"]
    assert job.main([*argv, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dry_run"] and said["metrics"] == ["frechet", "density-coverage"] and said["reference_n"] == 700
    assert job.main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["frechet_distance"] > 0 and said["coverage"] < 1 and not said["recorded"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_scores_are_recorded_by_the_names_of_their_features(
    root: Folder, folder: Folder, pixels: dict[str, Any]
) -> None:
    """Two Fréchet distances by different features, or from different data, are no points of one curve."""
    from mlflow import MlflowClient

    tracker = open_tracker(TrackingConfig(), folder, folder / "runs" / "digits", "digits", "an id of ours", {}, {})
    tracker.finish("FINISHED")
    uri = resolve_uri(TrackingConfig(), folder)
    digest = Manifest.load(root / "data").digest
    lineage = {
        "position": 300, "checkpoint_digest": "c", "tracking_uri": uri, "tracking_run": tracker.run_id,
        "data_digest": digest, "data_url": (root / "data").url,
    }  # fmt: skip
    samples = write_samples(folder / "samples", pixels["samples"], draw={}, **lineage)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Halves(), (torch.zeros(64, 1, 8, 8),)), buffer)
    folder.put("halves.pt2", buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    halves = FeatureConfig(kind="file", url=f"{folder.url}/halves.pt2", sha256=sha256, name="halves")
    for features, metrics in ((FeatureConfig(), ("frechet", "kid")), (halves, ("frechet", "precision-recall"))):
        asked = ScoreJob(samples=samples.url, reference=(root / "data").url, features=features, metrics=metrics)  # type: ignore[arg-type]
        assert score_job(asked)["recorded"]
    found = MlflowClient(tracking_uri=uri).get_run(tracker.tracker_id).data.metrics
    assert set(found) == {"frechet_distance", "kid", "frechet_distance_halves", "precision_halves", "recall_halves"}
    assert found["frechet_distance"] != found["frechet_distance_halves"]

    other = write_data(folder / "other data", pixels["samples"])
    assert score_job(ScoreJob(samples=samples.url, reference=(folder / "other data").url))["recorded"]
    assert not score_job(ScoreJob(samples=samples.url, reference=samples.url))["recorded"]
    now = MlflowClient(tracking_uri=uri).get_run(tracker.tracker_id).data.metrics
    assert set(now) - set(found) == {f"frechet_distance_against_{other.digest[:8]}"}
    assert {name: now[name] for name in found} == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ()}, "metrics is empty; name at least one of frechet, kid"),
        ({"metrics": ("fid",)}, "metrics is 'fid'; it must be one of"),
        ({"neighbours": 0}, "neighbours is 0; it must be at least 1"),
        ({"metrics": ("kid",), "promote": "m"}, "promote is 'm'; it needs frechet"),
        ({"metrics": ("kid",), "per_class": True}, "per_class is True; it needs frechet"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ScoreJob(samples="/s", **change)
