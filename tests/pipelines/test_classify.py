import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from jobs import classify as job
from pipelines.classify import ClassifyJob, _Plan, classify, program, train_classifier
from pipelines.errors import ConfigurationError, DataError
from pipelines.features import FeatureConfig
from pipelines.plain import from_dict
from pipelines.plan import held_out_rows
from pipelines.storage import Folder
from tests.pipelines.sets import write_data

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Folder:
    """A third of the digits."""
    with pytest.MonkeyPatch.context() as context:
        from pipelines import ingest
        from pipelines.parts import do

        context.setattr(ingest, "do", lambda runs, task, *_: do(runs, task, False))
        folder = Folder(str(tmp_path_factory.mktemp("digits")))
        write_data(folder, digits[0][:600], digits[1][:600])
        return folder


def test_it_learns_the_digits_and_leaves_a_program_that_score_can_read(data: Folder, folder: Folder) -> None:
    said = classify(ClassifyJob(data=data.url, out=folder.url, images=6400, held_out=100))
    assert said["accuracy"] > 0.9
    config = from_dict(FeatureConfig, yaml.safe_load(folder.get("features.yaml"))["features"], "")
    assert hashlib.sha256(folder.get("features.pt2")).hexdigest() == config.sha256
    about = json.loads(folder.get("classifier.json"))
    assert about["accuracy"] == said["accuracy"] and about["features"] == said["features"]
    # Classes lie apart in its features: the nearest mean tells most pictures right.
    plan = _Plan.find(ClassifyJob(data=data.url, out=folder.url, held_out=100))
    found = plan.manifest.read(data, np.arange(600), plan.view)
    features, held = config.load()(found.image), held_out_rows(600, 100)
    rest = np.setdiff1d(np.arange(600), held)
    means = np.stack([features[rest][found.label[rest] == label].mean(0) for label in range(10)])
    nearest = np.square(features[held][:, None] - means).sum(2).argmin(1)
    assert (nearest == found.label[held]).mean() > 0.85


def test_one_seed_is_one_program_and_it_is_that_of_the_network(data: Folder, folder: Folder) -> None:
    first = ClassifyJob(data=data.url, out=folder.url, images=640, held_out=100)
    plan = _Plan.find(first)
    network = train_classifier(plan)
    content = program(network, 64, plan.view.shape)
    assert classify(first)["features"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert classify(replace(first, seed=1))["features"]["sha256"] != hashlib.sha256(content).hexdigest()
    assert b"site-packages" not in content and b"models/classifier" not in content
    x, _ = next(plan.held_out())
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    classify(first)
    config = from_dict(FeatureConfig, yaml.safe_load(folder.get("features.yaml"))["features"], "")
    with torch.no_grad():
        np.testing.assert_allclose(config.load()(pixels), network.features(x), atol=1e-5)


def test_what_is_held_out_is_not_learned_from(data: Folder, folder: Folder) -> None:
    plan = _Plan.find(ClassifyJob(data=data.url, out=folder.url, images=1280, held_out=100))
    learned = {x.numpy().tobytes() for batch, _ in plan.batches() for x in batch}
    held = {x.numpy().tobytes() for batch, _ in plan.held_out() for x in batch}
    assert len(learned) == 500 and len(held) == 100 and not learned & held


def test_what_cannot_be_learned_from_is_refused(data: Folder, folder: Folder, capsys: pytest.CaptureFixture) -> None:
    write_data(folder / "plain", np.zeros((30, 8, 8, 1), np.uint8) + np.arange(30, dtype=np.uint8)[:, None, None, None])
    with pytest.raises(DataError, match="has 0 labels; a classifier needs two or more"):
        classify(ClassifyJob(data=(folder / "plain").url, out=folder.url))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"side": 9}, "side is 9; .* have 8 pixels: less"),
        ({"held_out": 600}, "held_out is 600; it must be less than .* 600: try 75"),
        ({"images": 100}, "images is 100; it must be a multiple of batch_images, 64: try 128"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; it must be positive"),
    ]
    for change, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            classify(ClassifyJob(data=data.url, out=folder.url, **change))
    assert job.main(["--data", data.url, "--out", f"{folder.url}/none", "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 400 and said["parameters"] > 10_000 and not (folder / "none").find()
