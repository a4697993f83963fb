"""Networks by MLflow's addresses, on a real server."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.presets import DIGITS
from models.network import NetworkConfig
from pipelines import networks
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.lineage import Exported, Trained
from pipelines.results import export, record_results
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import claim, plan_samples
from pipelines.storage import Folder
from pipelines.tracking import open_tracker
from pipelines.tracking_config import TrackingConfig
from tests.pipelines.committed import committed
from tests.pipelines.states import TINY

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Run:
    """A run that has ended, whose model is a version of a registered one."""

    def __init__(self, root: Path, uri: str, name: str, seed: int = 0) -> None:
        tracking = TrackingConfig(uri=uri, experiment="networks", register="net")
        self.job = replace(DIGITS, root=str(root), name=name, network=NetworkConfig(unet=TINY), tracking=tracking)
        committed(self.job.run, classes=0, seed=seed)
        self.trained = Trained.find(self.job.run.url)
        tracker = open_tracker(tracking, Folder(str(root)), self.job.run, name, f"{root.name}-{name}", {}, {})
        export(self.job, self.trained)
        record_results(self.job, self.trained, None, {}, tracker)
        tracker.finish("FINISHED")
        self.mlflow_id = tracker.tracker_id
        assert self.mlflow_id


@pytest.fixture(scope="module")
def client(mlflow_on_sqlite: str) -> Any:
    from pipelines import mlflow_find

    return mlflow_find.client(mlflow_on_sqlite)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mlflow_on_sqlite: str) -> Run:
    return Run(tmp_path_factory.mktemp("runs"), mlflow_on_sqlite, "first")


def same_weights(one: Trained, other: Trained) -> bool:
    weights, others = one.network(True).state_dict(), other.network(True).state_dict()
    return all(torch.equal(value, others[name]) for name, value in weights.items())


def test_each_address_is_the_checkpoint_itself(run: Run, mlflow_on_sqlite: str, tmp_path: Path) -> None:
    for address in ("models:/net@candidate", "models:/net/1", f"runs:/{run.mlflow_id}"):
        asked = networks.find(address, mlflow_on_sqlite, Folder(str(tmp_path)))
        assert asked.trained.folder == run.trained.folder and asked.trained.digest == run.trained.digest
        assert asked.version == ("" if address.startswith("runs:") else "net/1")
    assert not list(tmp_path.iterdir()), "nothing has to be kept"


def test_what_retention_has_deleted_is_taken_from_mlflow(run: Run, mlflow_on_sqlite: str, tmp_path: Path) -> None:
    """The same weights under the same digest, so a folder that was begun is gone on with."""
    moved = tmp_path / "moved"
    shutil.move(run.trained.folder.path(), moved)
    try:
        asked = networks.find("models:/net/1", mlflow_on_sqlite, Folder(str(tmp_path / "out")))
    finally:
        shutil.move(moved, run.trained.folder.path())
    assert isinstance(asked.trained, Exported) and asked.trained.digest == run.trained.digest
    assert same_weights(asked.trained, run.trained)
    assert Path(asked.trained.folder.path()).is_relative_to(tmp_path / "out"), "actors on other nodes read it there"


def test_half_a_copy_is_made_whole(run: Run, mlflow_on_sqlite: str, tmp_path: Path) -> None:
    """A job was killed while it copied; what says what the copy is comes last."""
    out, moved = Folder(str(tmp_path / "out")), tmp_path / "moved"
    shutil.move(run.trained.folder.path(), moved)
    try:
        whole = networks.find("models:/net/1", mlflow_on_sqlite, out).trained.folder
        written = [Path(whole.path(name)).stat().st_mtime_ns for name in ("ema.safetensors", "config.json")]
        assert written[0] < written[1]
        Path(whole.path("config.json")).unlink()
        whole.put("ema.safetensors", b"half")
        again = networks.find("models:/net/1", mlflow_on_sqlite, out).trained
    finally:
        shutil.move(moved, run.trained.folder.path())
    assert same_weights(again, run.trained)


def test_a_copy_that_is_of_another_network_is_refused(run: Run, mlflow_on_sqlite: str, tmp_path: Path) -> None:
    """It lies where samples are, and somebody has put another there."""
    out, moved = Folder(str(tmp_path / "out")), tmp_path / "moved"
    shutil.move(run.trained.folder.path(), moved)
    try:
        about = Path(networks.find("models:/net/1", mlflow_on_sqlite, out).trained.folder.path("config.json"))
        assert run.trained.digest in about.read_text()
        about.write_text(about.read_text().replace(run.trained.digest, "0" * 64))
        with pytest.raises(DataError, match=r"is not the checkpoint that MLflow knows as models:/net/1: its digest"):
            networks.find("models:/net/1", mlflow_on_sqlite, out)
    finally:
        shutil.move(moved, run.trained.folder.path())


def test_the_newest_checkpoint_is_the_one_that_a_folder_was_begun_with(tmp_path: Path) -> None:
    """The run trains on meanwhile; where that checkpoint is gone, the folder is refused and not mixed."""
    home = committed(Folder(str(tmp_path / "run")), classes=0)
    begun = Trained.find(home.url)
    job = SampleJob(checkpoint=home.url, out=str(tmp_path / "out"), tracking=TrackingConfig(uri="none"))
    claim(plan_samples(job))
    later = committed(Folder(str(tmp_path / "later")), classes=0, seed=1)
    shutil.move(Trained.find(later.url).folder.path(), (home / "checkpoint-000000000256").path())
    manifest = Path((home / "checkpoint-000000000256").path("manifest.json"))
    manifest.write_text(manifest.read_text().replace('"position": 128', '"position": 256'))
    assert Trained.find(home.url).digest != begun.digest
    asked_by_its_place = replace(job, checkpoint=Trained.find(home.url).folder.url)
    with pytest.raises(ConfigurationError, match="holds other samples: their checkpoint_digest"):
        claim(plan_samples(asked_by_its_place))
    again = plan_samples(job)
    assert again.trained.digest == begun.digest
    claim(again)
    shutil.rmtree(begun.folder.path())
    with pytest.raises(ConfigurationError, match="holds other samples: their checkpoint_digest"):
        claim(plan_samples(job))


def test_what_an_alias_means_when_a_folder_is_begun_is_what_it_is_finished_with(
    run: Run, client: Any, mlflow_on_sqlite: str, tmp_path: Path
) -> None:
    client.set_registered_model_alias("net", "champion", "1")
    tracking = TrackingConfig(uri=mlflow_on_sqlite)
    job = SampleJob(checkpoint="models:/net@champion", out=str(tmp_path / "monday"), tracking=tracking)
    claim(plan_samples(job))
    second = Run(tmp_path / "runs", mlflow_on_sqlite, "second", seed=1)
    version = client.get_model_version_by_alias("net", "candidate").version
    client.set_registered_model_alias("net", "champion", version)
    again = plan_samples(job)
    assert again.trained.digest == run.trained.digest and again.lineage["model_version"] == "net/1"
    claim(again)
    tuesday = plan_samples(replace(job, out=str(tmp_path / "tuesday")))
    assert tuesday.trained.digest == second.trained.digest != run.trained.digest
    assert tuesday.lineage["model_version"] == f"net/{version}"
    # Two that begin at once, of which one still has heard of the old champion.
    with pytest.raises(TryAgainError, match=r"another job has just begun in .*/monday, with another network"):
        claim(replace(tuesday, out=again.out))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/net", "which is no address of MLflow's: give models:/NAME@ALIAS"),
        ("models:/nobody@champion", "MLflow at .* has none"),
        ("models:/net@nobody", "MLflow at .* has none"),
        ("models:/net/99", "MLflow at .* has none"),
        ("runs:/0123", "MLflow at .* has none"),
    ],
)
def test_an_address_that_means_nothing(
    address: str, message: str, run: Run, mlflow_on_sqlite: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        networks.find(address, mlflow_on_sqlite, Folder(str(tmp_path)))


def test_an_address_needs_a_tracker_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigurationError, match=r"tracking\.uri is empty"):
        networks.find("models:/net/1", "", Folder(str(tmp_path)))
    with pytest.raises(TryAgainError, match="does not tell what models:/net/1 is"):
        networks.find("models:/net/1", "http://127.0.0.1:9", Folder(str(tmp_path)))


def test_a_run_without_a_model(client: Any, mlflow_on_sqlite: str, tmp_path: Path) -> None:
    other = client.create_run(client.create_experiment("without a model"))
    with pytest.raises(ConfigurationError, match="that run has no model in MLflow"):
        networks.find(f"runs:/{other.info.run_id}", mlflow_on_sqlite, Folder(str(tmp_path)))


def test_of_a_checkpoint_of_another_format_mlflows_copy_is_drawn_from(
    run: Run, mlflow_on_sqlite: str, tmp_path: Path
) -> None:
    manifest = run.trained.folder.get("manifest.json")
    run.trained.folder.put("manifest.json", json.dumps(json.loads(manifest) | {"format": 2}).encode())
    try:
        asked = networks.find("models:/net/1", mlflow_on_sqlite, Folder(str(tmp_path)))
    finally:
        run.trained.folder.put("manifest.json", manifest)
    assert same_weights(asked.trained, run.trained)


def test_weights_that_are_others_by_now_are_not_taken_for_the_model(
    run: Run, mlflow_on_sqlite: str, tmp_path: Path
) -> None:
    """Another run has been trained into the folder: MLflow's copy counts."""
    at = Path(run.trained.folder.path())
    shutil.copytree(at, tmp_path / "kept")
    other = committed(Folder(str(tmp_path / "other")), classes=0, seed=2)
    shutil.rmtree(at)
    shutil.copytree(Trained.find(other.url).folder.path(), at)
    try:
        asked = networks.find("models:/net/1", mlflow_on_sqlite, Folder(str(tmp_path / "out")))
    finally:
        shutil.rmtree(at)
        shutil.copytree(tmp_path / "kept", at)
    assert asked.trained.digest == run.trained.digest and same_weights(asked.trained, run.trained)
